"""Models: loading, new token rows, text and latents."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import tiny_pipeline

from mifo.backbones.loading import load_model, load_outline
from mifo.backbones.settings import ModelSettings
from mifo.errors import MifoError
from mifo.method.backbone import Conditioning


@pytest.fixture
def model(source):
    return load_model(ModelSettings("tiny", source))


def test_sizes_dtypes_and_frozen_weights(source):
    model = load_model(ModelSettings("tiny", source, dtype="bfloat16"))
    assert (model.image_size, model.latent_shape) == (32, (4, 16, 16))
    assert model.identity()["prediction_type"] == model.process.prediction_type == "epsilon"
    assert model.unet.dtype == model.text_encoder.dtype == torch.bfloat16
    assert model.vae.dtype == torch.float32
    parameters = [p for part in (model.unet, model.vae, model.text_encoder) for p in part.parameters()]
    assert not any(parameter.requires_grad for parameter in parameters)


def test_prompts_are_encoded_as_the_pipeline_does(model, source):
    pipeline = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    prompts = ["a photo of a red car", "a"]
    expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    assert torch.equal(model.encode_prompts(prompts).parts["states"], expected)


def test_latents_are_scaled_as_the_pipeline_does(model, source):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, deviation = model.encode_images(images, at_once=2)
    pipeline = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    posterior = pipeline.vae.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(mean, posterior.mean * pipeline.vae.config.scaling_factor)
    torch.testing.assert_close(deviation, posterior.std * pipeline.vae.config.scaling_factor)
    expected = pipeline.image_processor.postprocess(
        pipeline.vae.decode(mean / pipeline.vae.config.scaling_factor, return_dict=False)[0].detach(), "pt"
    )
    torch.testing.assert_close(model.decode_latents(mean, at_once=2), expected)


def test_fingerprint_tells_weights_apart_and_not_folders(source, tmp_path, model):
    copy = shutil.copytree(source, tmp_path / "copy")
    model.unet.save_pretrained(copy / "unet", max_shard_size="20KB")
    assert len(list((copy / "unet").glob("*.safetensors"))) > 1
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    half = ModelSettings("copy", str(copy), dtype="float16")
    assert load_model(half).fingerprint == model.fingerprint
    other = tiny_pipeline(tmp_path / "other", seed=1)
    assert load_model(ModelSettings("other", str(other))).fingerprint != model.fingerprint


def test_unknown_models_are_refused_in_one_sentence(source, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MifoError, match=r"nobody/nothing at revision main .* network"):
        load_model(ModelSettings("x", "nobody/nothing", "main"))
    with pytest.raises(MifoError, match="neither a local folder"):
        load_model(ModelSettings("x", "no/such/folder/here"))
    with pytest.raises(MifoError, match="lacks tokenizer, text_encoder"):
        load_model(ModelSettings("x", str(tmp_path)))
    with pytest.raises(MifoError, match=r"model\.dtype=int8"):
        load_model(ModelSettings("x", source, dtype="int8"))
    broken = shutil.copytree(source, tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(MifoError, match="could not be loaded"):
        load_model(ModelSettings("x", str(broken)))


def test_new_rows_are_read_at_their_tokens_and_only_they_get_gradients(model):
    def states_of(prompt):
        return model.encode_prompts([prompt]).parts["states"]

    plain = states_of("a photo of a car")
    table = model.text_encoder.get_input_embeddings()
    assert model.new_words == () and model.new_rows == {}
    tokens = ["<asset0>", "<asset1>", "<asset10>"]
    model.add_words(tokens, [None, "car", "red car"])
    assert torch.equal(states_of("a photo of a car"), plain)
    assert model.new_words == tuple(tokens)
    (rows,) = model.new_rows.values()
    ids = model.tokenize(["a <asset1> and <asset10>"])
    assert [model.places(ids[0], token).tolist() for token in tokens] == [[], [2], [4]]
    states = model.text_encoder.get_input_embeddings()(ids[:, 0])[0]
    assert torch.equal(states[2], rows[1]) and torch.equal(states[4], rows[2])
    assert torch.equal(states[1], table.weight[ids[0, 0, 1]])

    model.set_trainable("tokens")
    model.encode(ids).parts["states"].sum().backward()
    norms = rows.grad.norm(dim=1)
    assert norms[0] == 0 and norms[1] > 0 and norms[2] > 0
    others = [*model.text_encoder.parameters(), *model.unet.parameters()]
    assert all(parameter.grad is None for parameter in others if parameter is not rows)


def test_initial_rows(source):
    def rows(initializers, seed=0):
        model = load_model(ModelSettings("tiny", source))
        tokens = [f"<asset{i}>" for i in range(len(initializers))]
        model.add_words(tokens, initializers, seed)
        return model, model.new_rows["text_encoder"].detach()

    model, words = rows(["car", "red car"])
    table = model.text_encoder.get_input_embeddings().table.weight
    car, red = (
        table[model.tokenizer(word, add_special_tokens=False).input_ids[0]] for word in ("car", "red")
    )
    torch.testing.assert_close(words, torch.stack([car, (car + red) / 2]))
    _, many = rows([None] * 2000)
    torch.testing.assert_close(many.mean(0), table.mean(0), atol=5 * float(table.std() / 2000**0.5), rtol=0)
    torch.testing.assert_close(many.std(0), table.std(0), rtol=0.1, atol=0)
    assert torch.equal(rows([None])[1], rows([None])[1])
    assert not torch.equal(rows([None])[1], rows([None], seed=1)[1])
    with pytest.raises(MifoError, match="holds no word"):
        rows([" "])


def test_clashing_tokens_and_long_prompts_are_refused(model):
    model.tokenizer.add_tokens("<mine>")
    with pytest.raises(MifoError, match="already has the token <mine>"):
        model.add_words(["<asset0>", "<mine>"])
    model.add_words(["<asset0>"])
    with pytest.raises(MifoError, match="already carries <asset0>"):
        model.add_words(["<asset1>"])
    with pytest.raises(MifoError, match="32 fit"):
        model.tokenize(["a " * 40])


def test_what_learns(model):
    model.add_words(["<asset0>"], ["car"])
    assert model.trainable("tokens") == {"unet": {}, "text_encoder": {}}
    kv = model.trainable("cross_attention_kv")
    width = model.unet.config.cross_attention_dim
    assert len(kv["unet"]) == 2 * sum(".attn2.processor" in name for name in model.unet.attn_processors)
    assert all(parameter.shape[1] == width for parameter in kv["unet"].values()) and not kv["text_encoder"]
    denoiser = model.trainable("denoiser")
    assert len(denoiser["unet"]) == len(list(model.unet.parameters())) and not denoiser["text_encoder"]
    full = model.trainable("full")
    assert full["unet"].keys() == denoiser["unet"].keys()
    assert len(full["text_encoder"]) == len(list(model.text_encoder.parameters())) - 2
    for what in ("tokens", "cross_attention_kv", "denoiser", "full"):
        model.set_trainable(what)
        learning = {
            id(each)
            for part in (model.unet, model.text_encoder)
            for each in part.parameters()
            if each.requires_grad
        }
        chosen = {id(each) for part in model.trainable(what).values() for each in part.values()}
        assert learning == chosen | {id(model.new_rows["text_encoder"])}
    model.freeze()
    assert not any(
        each.requires_grad for part in (model.unet, model.text_encoder) for each in part.parameters()
    )


def test_lora_starts_as_the_base_model(model):
    pytest.importorskip("peft")
    model.add_words(["<asset0>"], ["car"])
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def predict():
        return model.predict(latents, torch.tensor(5), model.encode_prompts(["a photo of <asset0>"]))[0]

    before = predict()
    model.add_lora(2)
    model.set_trainable("lora")
    torch.testing.assert_close(predict(), before)
    learning = [name for name, each in model.unet.named_parameters() if each.requires_grad]
    assert learning and all("lora_" in name for name in learning)


def test_an_outline_tells_prompts_and_sites_without_weights(model, source):
    outline = load_outline(ModelSettings("tiny", source))
    assert outline.sites == model.sites and outline.default_sites == model.default_sites
    assert outline.latent_shape == model.latent_shape
    assert all(parameter.is_meta for parameter in outline.unet.parameters())
    for each in (outline, model):
        each.add_words(["<asset0>"])
    assert outline.words("a photo of <asset0>") == model.words("a photo of <asset0>")


def test_conditioning_is_picked_joined_and_rounded_by_rows(model):
    both = model.encode_prompts(["a red car", "a cat"])
    assert both.samples == 2
    parts = [both.rows(slice(i, i + 1)) for i in range(2)]
    joined = Conditioning.joined(parts[::-1])
    assert torch.equal(joined.parts["states"], both.parts["states"].flip(0))
    assert both.to(torch.bfloat16).parts["states"].dtype == torch.bfloat16
