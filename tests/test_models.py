"""Models: loading, new token rows, text and latents."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from mifo.backbones.images import decode_latents, encode_images
from mifo.backbones.text import encode_ids, encode_prompts, tokenize
from mifo.backbones.trainable import add_lora, new_rows, set_trainable, trainable_parameters
from tiny import tiny_pipeline

from mifo.backbones.loading import load_model
from mifo.backbones.settings import ModelSettings
from mifo.backbones.tokens import add_instance_tokens
from mifo.errors import MifoError


@pytest.fixture
def model(source):
    return load_model(ModelSettings("tiny", source))


def test_sizes_dtypes_and_frozen_weights(source):
    model = load_model(ModelSettings("tiny", source, dtype="bfloat16"))
    assert (model.image_size, model.latent_size, model.prediction_type) == (32, 16, "epsilon")
    assert model.unet.dtype == model.text_encoder.dtype == torch.bfloat16
    assert model.vae.dtype == torch.float32
    parameters = [p for part in (model.unet, model.vae, model.text_encoder) for p in part.parameters()]
    assert not any(parameter.requires_grad for parameter in parameters)


def test_prompts_are_encoded_as_the_pipeline_does(model, source):
    pipeline = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    prompts = ["a photo of a red car", "a"]
    expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    assert torch.equal(encode_prompts(model, prompts), expected)


def test_latents_are_scaled_as_the_pipeline_does(model, source):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, deviation = encode_images(model, images, batch_size=2)
    pipeline = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    posterior = pipeline.vae.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(mean, posterior.mean * pipeline.vae.config.scaling_factor)
    torch.testing.assert_close(deviation, posterior.std * pipeline.vae.config.scaling_factor)
    expected = pipeline.image_processor.postprocess(
        pipeline.vae.decode(mean / pipeline.vae.config.scaling_factor, return_dict=False)[0].detach(), "pt"
    )
    torch.testing.assert_close(decode_latents(model, mean, batch_size=2), expected)


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
    plain = encode_prompts(model, ["a photo of a car"])
    table = model.text_encoder.get_input_embeddings()
    embedding = add_instance_tokens(model, ["<asset0>", "<asset1>", "<asset10>"], [None, "car", "red car"])
    assert torch.equal(encode_prompts(model, ["a photo of a car"]), plain)
    ids = tokenize(model.tokenizer, ["a <asset1> and <asset10>"])
    states = model.text_encoder.get_input_embeddings()(ids)[0]
    assert torch.equal(states[2], embedding.rows[1]) and torch.equal(states[4], embedding.rows[2])
    assert torch.equal(states[1], table.weight[ids[0, 1]])

    set_trainable(model, "tokens")
    encode_ids(model, ids).sum().backward()
    norms = new_rows(model).grad.norm(dim=1)
    assert norms[0] == 0 and norms[1] > 0 and norms[2] > 0
    others = [*model.text_encoder.parameters(), *model.unet.parameters()]
    assert all(parameter.grad is None for parameter in others if parameter is not new_rows(model))


def test_initial_rows(source):
    def rows(initializers, seed=0):
        model = load_model(ModelSettings("tiny", source))
        tokens = [f"<asset{i}>" for i in range(len(initializers))]
        return model, add_instance_tokens(model, tokens, initializers, seed).rows.detach()

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
        add_instance_tokens(model, ["<asset0>", "<mine>"], None)
    add_instance_tokens(model, ["<asset0>"], None)
    with pytest.raises(MifoError, match="already carries <asset0>"):
        add_instance_tokens(model, ["<asset1>"], None)
    with pytest.raises(MifoError, match="32 fit"):
        tokenize(model.tokenizer, ["a " * 40])


def test_what_learns(model):
    add_instance_tokens(model, ["<asset0>"], ["car"])
    kv = trainable_parameters(model, "kv")
    width = model.unet.config.cross_attention_dim
    assert len(kv["unet"]) == 2 * sum(".attn2.processor" in name for name in model.unet.attn_processors)
    assert all(parameter.shape[1] == width for parameter in kv["unet"].values()) and not kv["text_encoder"]
    assert len(trainable_parameters(model, "unet")["unet"]) == len(list(model.unet.parameters()))
    full = trainable_parameters(model, "full")["text_encoder"]
    assert len(full) == len(list(model.text_encoder.parameters())) - 2
    with pytest.raises(MifoError, match="learn=all"):
        trainable_parameters(model, "all")


def test_lora_starts_as_the_base_model(model):
    pytest.importorskip("peft")
    add_instance_tokens(model, ["<asset0>"], ["car"])
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def predict():
        return model.unet(latents, 5, encode_prompts(model, ["a photo of <asset0>"])).sample

    before = predict()
    add_lora(model, 2)
    set_trainable(model, "lora")
    torch.testing.assert_close(predict(), before)
    learning = [name for name, each in model.unet.named_parameters() if each.requires_grad]
    assert learning and all("lora_" in name for name in learning)
