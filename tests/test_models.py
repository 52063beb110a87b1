"""Models: loading, new token rows, text and latents."""

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline

from mifo.backbones.loading import load_model, load_outline
from mifo.backbones.schedulers import ddim_of
from mifo.backbones.settings import ModelSettings
from mifo.data.settings import PriorSettings
from mifo.errors import MifoError
from mifo.making.class_pictures import class_pictures


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


def copy_of(source, folder, **changes):
    """The settings of a copy of a pipeline, with keys of its JSON files changed; `...` removes a key."""
    shutil.copytree(source, folder)
    for file, keys in changes.items():
        path = folder / FILES[file]
        content = json.loads(path.read_text()) | keys
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return ModelSettings("copy", str(folder))


FILES = {
    "index": "model_index.json",
    "scheduler": "scheduler/scheduler_config.json",
    "text_encoder": "text_encoder/config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
    "unet": "unet/config.json",
    "vae": "vae/config.json",
}


def save_variant(folder, name="fp16"):
    """Save the weights of a pipeline beside themselves in 16 bits."""
    for file in [*folder.glob("*/model.safetensors"), *folder.glob("*/diffusion_pytorch_model.safetensors")]:
        half = {key: value.half() for key, value in load_file(file).items()}
        save_file(half, file.with_name(f"{file.stem}.{name}.safetensors"), {"format": "pt"})


def test_fingerprint_tells_weights_apart_and_not_folders(source, tmp_path, model):
    copy = shutil.copytree(source, tmp_path / "copy")
    model.unet.save_pretrained(copy / "unet", max_shard_size="20KB")
    assert len(list((copy / "unet").glob("*.safetensors"))) > 1
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    half = ModelSettings("copy", str(copy), dtype="float16")
    assert load_model(half).fingerprint == model.fingerprint
    other = tiny_pipeline(tmp_path / "other", seed=1)
    assert load_model(ModelSettings("other", str(other))).fingerprint != model.fingerprint


def test_fingerprints_of_earlier_results_stay_what_they_were():
    known = "1d1cc337ebd64883b5286af9fae2e18e028eeca24cfe9ae58b4efad41408997a"  # in every learned.json
    assert load_model(ModelSettings()).fingerprint == known


def test_a_variant_beside_the_weights_counts_only_when_it_is_asked_for(source, tmp_path, model):
    settings = copy_of(source, tmp_path / "copy")
    save_variant(tmp_path / "copy")
    beside, asked = load_model(settings), load_model(replace(settings, variant="fp16"))
    assert beside.fingerprint == model.fingerprint != asked.fingerprint
    assert torch.equal(beside.unet.conv_in.weight, model.unet.conv_in.weight)
    assert torch.equal(asked.unet.conv_in.weight, model.unet.conv_in.weight.half().float())
    (tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(
        MifoError, match=r"missing \(beside it lies diffusion_pytorch_model\.fp16.*model\.variant"
    ):
        load_model(settings)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_are_downloaded_after_the_small_files_and_only_those_that_are_loaded(
    source, tmp_path, monkeypatch, variant
):
    hub = shutil.copytree(source, tmp_path / "hub")
    save_variant(hub)
    asked = []

    def download(name, revision, allow_patterns):
        asked.append(
            {
                file.relative_to(hub).as_posix()
                for file in hub.rglob("*")
                if any(fnmatch(file.relative_to(hub).as_posix(), pattern) for pattern in allow_patterns)
            }
        )
        return str(hub)

    monkeypatch.setattr("mifo.backbones.loading.snapshot_download", download)
    load_model(ModelSettings("x", "some/where", variant=variant))
    small, all_files = asked
    assert not any(name.endswith(".safetensors") for name in small) and set(FILES.values()) <= small
    ending = f".{variant}.safetensors" if variant else ".safetensors"
    stems = ("text_encoder/model", "vae/diffusion_pytorch_model", "unet/diffusion_pytorch_model")
    assert all_files - small == {stem + ending for stem in stems}
    (hub / "unet" / "config.json").write_text("{}")
    with pytest.raises(MifoError, match="another kind"):
        load_model(ModelSettings("x", "some/where", variant=variant))
    assert asked[2:] == [small]


def test_unknown_models_are_refused_in_one_sentence(source, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MifoError, match=r"nobody/nothing at revision main .* unset HF_HUB_OFFLINE"):
        load_model(ModelSettings("x", "nobody/nothing", "main"))
    with pytest.raises(MifoError, match="neither a local folder"):
        load_model(ModelSettings("x", "no/such/folder/here"))
    with pytest.raises(MifoError, match="lacks tokenizer, text_encoder"):
        load_model(ModelSettings("x", str(tmp_path)))
    with pytest.raises(MifoError, match=r"model\.dtype=int8"):
        load_model(ModelSettings("x", source, dtype="int8"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"unet": {"in_channels": 9}}, "in_channels in unet/config.json is 9, where MIFO needs 4"),
        ({"unet": {"addition_embed_type": "text_time"}}, "addition_embed_type .* is text_time"),
        ({"unet": {"class_embed_type": "timestep"}}, "class_embed_type .* is timestep"),
        (
            {"unet": {"cross_attention_dim": 24}},
            "cross_attention_dim .* is 24, where MIFO needs 16, the width",
        ),
        ({"unet": {"sample_size": [16, 16]}}, r"sample_size .* is \[16, 16\]"),
        ({"unet": {"sample_size": None}}, "sample_size .* is None"),
        ({"vae": {"latent_channels": 16}}, "latent_channels in vae/config.json is 16"),
        ({"vae": {"_class_name": "AutoencoderTiny"}}, "vae in vae/config.json is AutoencoderTiny"),
        ({"text_encoder": {"architectures": ["T5EncoderModel"]}}, "text_encoder .* is T5EncoderModel"),
        ({"index": {"text_encoder_2": ["transformers", "CLIPTextModel"]}}, "text_encoder_2 .* is present"),
        ({"index": {"unet": ["diffusers", "FluxTransformer2DModel"]}}, "unet .* is FluxTransformer2DModel"),
        (
            {"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}},
            "FlowMatchEulerDiscreteScheduler",
        ),
        ({"scheduler": {"clip_sample": True}}, "clip_sample is true"),
        ({"scheduler": {"beta_schedule": "sigmoid"}}, "could not be loaded .*sigmoid is not implemented"),
    ],
)
def test_models_of_another_kind_are_refused_before_weights_are_read(source, tmp_path, changes, reason):
    settings = copy_of(source, tmp_path / "copy", **changes)
    for file in (tmp_path / "copy").rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(MifoError, match=reason):
        load_model(settings)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "norm_eps", "../.."),
        ("unet", "norm_eps", None),
        ("unet", "freq_shift", True),
        ("unet", "down_block_types", "DownBlock2D"),
        ("vae", "scaling_factor", []),
        ("text_encoder", "layer_norm_eps", "1"),
        ("scheduler", "beta_start", "0.1"),
        ("scheduler", "prediction_type", 3),
    ],
)
def test_values_of_another_type_are_refused_with_file_and_key(source, tmp_path, part, key, value):
    settings = copy_of(source, tmp_path / "copy", **{part: {key: value}})
    with pytest.raises(MifoError, match=f"/{part}/.*json is damaged: .*{key}"):
        load_outline(settings)


def half_weights(folder):
    file = folder / "text_encoder" / "model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "unet/config.json").unlink(), r"unet/config\.json cannot be read"),
        (lambda folder: (folder / "vae/config.json").write_text("[]"), r"vae/config\.json is damaged"),
        (lambda folder: (folder / FILES["scheduler"]).write_text("[]"), "scheduler_config.json is damaged"),
        (
            lambda folder: [file.unlink() for file in (folder / "tokenizer").glob("t*r.json")],
            "lacks tokenizer.json",
        ),
        (lambda folder: next(folder.glob("vae/*.safetensors")).unlink(), "vae/.*safetensors is missing"),
        (
            lambda folder: next(folder.glob("unet/*.safetensors")).write_bytes(b"no"),
            r"unet/.*safetensors is damaged",
        ),
        (half_weights, "could not be loaded .*text_encoder lacks the weights"),
    ],
)
def test_half_complete_and_damaged_folders_are_refused(source, tmp_path, damage, reason):
    settings = copy_of(source, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(MifoError, match=reason):
        load_model(settings)


def test_a_scheduler_of_another_class_is_read_with_the_defaults_of_its_class(source, tmp_path, model):
    """Stable Diffusion 1.x and 2.1 base have PNDM, which knows no `clip_sample` and ends at timestep 0."""
    pndm = {"_class_name": "PNDMScheduler", "clip_sample": ..., "set_alpha_to_one": ..., "thresholding": ...}
    settings = copy_of(source, tmp_path / "copy", scheduler=pndm)
    ours = ddim_of(load_model(settings).noise_scheduler)
    expected = ddim_of(model.noise_scheduler)
    assert torch.equal(ours.alphas_cumprod, expected.alphas_cumprod)
    assert replace(ours, alphas_cumprod=None) == replace(expected, alphas_cumprod=None)
    assert (ours.timestep_spacing, ours.steps_offset, ours.set_alpha_to_one) == ("leading", 1, False)


def test_a_tokenizer_without_a_length_takes_that_of_the_text_encoder(source, tmp_path, model):
    without = load_model(copy_of(source, tmp_path / "copy", tokenizer={"model_max_length": ...}))
    assert without.tokenizer.model_max_length == 32
    prompts = ["a photo of a red car"]
    assert torch.equal(
        without.encode_prompts(prompts).parts["states"], model.encode_prompts(prompts).parts["states"]
    )


def test_a_text_encoder_that_leaves_its_width_out_has_that_of_its_class(source, tmp_path):
    unnamed, wide = {"hidden_size": ...}, {"cross_attention_dim": 512}
    load_outline(copy_of(source, tmp_path / "copy", text_encoder=unnamed, unet=wide))


def test_class_pictures_of_other_timesteps_are_made_anew(source, model, tmp_path):
    prior = PriorSettings(pictures=1, steps=1, cache=str(tmp_path))
    (first,) = class_pictures(model, ["a car"], prior, 0)[0].files
    other = load_model(copy_of(source, tmp_path / "copy", scheduler={"steps_offset": 0}))
    (second,) = class_pictures(other, ["a car"], prior, 0)[0].files
    assert first != second and first.read_bytes() != second.read_bytes()


def test_a_word_without_a_row_in_the_table_is_refused_by_name(source, tmp_path, model):
    settings = copy_of(source, tmp_path / "copy")
    model.tokenizer.add_tokens(["<mystyle>", "sks"])
    model.tokenizer.save_pretrained(tmp_path / "copy" / "tokenizer")
    with pytest.raises(MifoError, match=r"knows the word <mystyle>, .* take the tokenizer"):
        load_outline(settings)


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
    distance = (many - table.mean(0)) / table.std(0)
    torch.testing.assert_close(distance.mean(0), torch.zeros(16), atol=5e-6, rtol=0)
    torch.testing.assert_close(distance.std(0), torch.full((16,), 3e-5), rtol=0.1, atol=0)
    assert torch.equal(rows([None])[1], rows([None])[1])
    assert not torch.equal(rows([None])[1], rows([None], seed=1)[1])
    with pytest.raises(MifoError, match="holds no word"):
        rows([" "])


def test_clashing_tokens_and_long_prompts_are_refused(model):
    model.tokenizer.add_tokens("<mine>")
    with pytest.raises(MifoError, match="already has the word <mine>"):
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


def test_conditioning_is_picked_and_rounded_by_rows(model):
    both = model.encode_prompts(["a red car", "a cat"])
    assert both.samples == 2
    assert torch.equal(both.rows(slice(1, 2)).parts["states"], both.parts["states"][1:])
    assert both.to(torch.bfloat16).parts["states"].dtype == torch.bfloat16
