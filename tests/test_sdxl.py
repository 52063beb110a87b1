"""Stable Diffusion XL behind the seam: its prompts, its sites, plain sampling, and a whole run."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file
from tiny import a_step_of_each, moved_weights, small_road, tiny_sdxl_pipeline, two_instances

from mifo.acceleration.settings import PerformanceSettings
from mifo.backbones.learned import load_learned
from mifo.backbones.loading import load_model, load_outline
from mifo.backbones.settings import ModelSettings
from mifo.benchmark.rows import Bench, diffusers_step, stage2_step
from mifo.benchmark.settings import BenchmarkSettings
from mifo.benchmark.shapes import SHAPES, random_model
from mifo.data.settings import PriorSettings
from mifo.errors import MifoError
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.losses.settings import PenaltySettings
from mifo.method.synthesis.sampler import Sampler
from mifo.method.synthesis.settings import SynthesisSettings
from mifo.training.fit import learn
from mifo.training.settings import LearningSettings

CPU = torch.device("cpu")
PROMPTS = ["a photo of a red car", "a cat in the snow"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return str(tiny_sdxl_pipeline(tmp_path_factory.mktemp("sdxl")))


@pytest.fixture(scope="module")
def pipeline(source):
    pipeline = StableDiffusionXLPipeline.from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_does(model, pipeline):
    states, empty, pooled, empty_pooled = pipeline.encode_prompt(PROMPTS, device="cpu")
    found = model.encode_prompts(["", "", *PROMPTS]).parts
    torch.testing.assert_close(found["states"], torch.cat([empty, states]))
    torch.testing.assert_close(found["text_embeds"], torch.cat([empty_pooled, pooled]))
    assert not empty.any() and not empty_pooled.any()  # the model's own force_zeros_for_empty_prompt
    assert found["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 4


@torch.no_grad()
def test_another_second_encoder_and_encoded_empty_prompts_are_another_model(source, tmp_path, model):
    folder = shutil.copytree(source, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.text_encoder_2.text_projection.weight.data.add_(1)
    pipeline.text_encoder_2.save_pretrained(folder / "text_encoder_2")
    copy = load_model(ModelSettings("copy", str(folder)))
    _, empty, _, pooled = pipeline.encode_prompt("a car", device="cpu")
    found = copy.encode_prompts([""]).parts
    torch.testing.assert_close(found["states"], empty)
    torch.testing.assert_close(found["text_embeds"], pooled)
    assert copy.fingerprint != model.fingerprint
    assert copy.sampling() != model.sampling()  # other class pictures


@torch.no_grad()
def test_plain_sampling_gives_the_pipelines_latents(model, pipeline):
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    settings = SynthesisSettings(steps=4, guidance_scale=5.0)
    ours = Sampler(model, settings, GuidanceSettings())(model.encode_prompts(["", "", *PROMPTS]), noise)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    theirs = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=5.0, latents=noise, output_type="latent"
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_pooled_state_is_that_of_the_end_also_behind_new_words(model):
    model.add_words(["<asset0>"])
    ids = model.tokenize(["a photo of <asset0> in the snow"])
    end = ids[0, 1].tolist().index(model.tokenizer_2.eos_token_id)
    assert (
        ids[0, 1, end + 1] == model.tokenizer_2.convert_tokens_to_ids("!") == model.tokenizer_2.pad_token_id
    )
    encoder = model.text_encoder_2
    states = encoder(ids[:, 1]).last_hidden_state
    expected = encoder.text_projection(states[:, end])
    torch.testing.assert_close(model.encode(ids).parts["text_embeds"], expected)


def test_as_many_sites_are_read_as_on_stable_diffusion(source):
    """Stable Diffusion has 6, 5, 8 and 6: XL's are in the last transformer blocks, at half and a quarter."""
    outline = load_outline(ModelSettings("tiny", source))
    assert len(outline.sites) == 140

    def told(sites):
        return [
            (site.name.replace("attentions.", "").replace("transformer_blocks.", ""), site.size[0])
            for site in sites
        ]

    first = [f"up_blocks.0.{i}.9" for i in range(3)]
    both = [(f"{name}.attn{i}", 8) for name in first for i in (1, 2)]
    default = outline.default_sites
    assert told(default.shapes) == both
    assert told(default.guidance) == [("mid_block.0.9.attn1", 8), ("mid_block.0.9.attn2", 8), *both]
    words = [(f"{name}.attn2", 8) for name in first]
    assert told(default.semantic) == words + [(f"up_blocks.1.{i}.1.attn2", 16) for i in range(3)]
    assert told(default.finetuning) == [(f"down_blocks.2.{i}.9.attn2", 8) for i in range(2)] + words


def test_both_tables_learn_together(model):
    model.add_words(["<asset0>", "<asset1>"], ["car", None])
    model.set_trainable("tokens")
    assert {name: rows.shape for name, rows in model.new_rows.items()} == {
        "text_encoder": (2, 16),
        "text_encoder_2": (2, 24),
    }
    parts = model.encode(model.tokenize(["a photo of <asset0> and <asset1>"])).parts
    (parts["states"].square().sum() + parts["text_embeds"].square().sum()).backward()
    assert all(rows.grad.any(1).all() for rows in model.new_rows.values())


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        (
            "unet",
            {"cross_attention_dim": 16},
            "cross_attention_dim .* is 16, where MIFO needs 40, the width of the text encoders",
        ),
        (
            "unet",
            {"addition_embed_type": "text"},
            "addition_embed_type .* is text, where MIFO needs text_time",
        ),
        ("unet", {"projection_class_embeddings_input_dim": 70}, "input_dim .* is 70, where MIFO needs 72"),
        ("text_encoder_2", {"architectures": ["T5EncoderModel"]}, "text_encoder_2 .* is T5EncoderModel"),
    ],
)
def test_models_of_another_kind_are_refused_before_weights_are_read(source, tmp_path, part, changes, reason):
    folder = shutil.copytree(source, tmp_path / "copy")
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(MifoError, match=reason):
        load_outline(ModelSettings("copy", str(folder)))


def test_the_whole_road_of_a_run(mifo, photo, tmp_path):
    source = tiny_sdxl_pipeline(tmp_path / "sdxl", depths=(1, 2))
    model = load_model(ModelSettings("tiny", str(source)))
    assert mifo(*small_road(source, photo, tmp_path / "prior")) == 0
    learned = tmp_path / "run" / "learned"
    rows = load_file(learned / "tokens.safetensors")
    assert {name: each.shape for name, each in rows.items()} == {
        "rows": (2, 16),
        "rows.text_encoder_2": (2, 24),
    }
    weights = {name: load_file(learned / f"{name}.safetensors") for name in model.networks}
    assert all("lora_" in name for each in weights.values() for name in each)
    assert (tmp_path / "run" / "pictures" / "pictures.json").is_file()
    assert next((tmp_path / "prior").rglob("*.png"))
    load_learned(learned, model)
    assert torch.equal(model.new_rows["text_encoder"], rows["rows"])
    assert torch.equal(model.new_rows["text_encoder_2"], rows["rows.text_encoder_2"])
    for name, each in model.trainable("lora").items():
        assert all(torch.equal(parameter, weights[name][own]) for own, parameter in each.items())


@pytest.mark.parametrize("what", ["tokens", "full"])
def test_what_learned_is_saved_and_loaded(tmp_path, what):
    """Words alone, or all weights of the U-Net and of both text encoders too."""
    source = str(tiny_sdxl_pipeline(tmp_path / "sdxl", depths=(1, 1)))
    settings = a_step_of_each(what, tmp_path / "prior")
    model, base = (load_model(ModelSettings("tiny", source)) for _ in range(2))
    trainer = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    learned = learn(model, two_instances(), settings, PenaltySettings(), tmp_path, trainer=trainer)
    names = {part: set(each) for part, each in base.trainable(what).items()}
    for part, moved in moved_weights(base, model).items():
        # XL reads the first encoder's states before its last layer alone
        unread = ("encoder.layers.1.", "final_layer_norm") if part == "text_encoder" else ()
        read = [name for name in names[part] if not name.startswith(unread)]
        assert moved <= names[part] and len(moved) >= 0.9 * len(read)
    load_learned(learned, base)
    ours, theirs = (each.encode_prompts(["a photo of <asset0> and <asset1>"]) for each in (model, base))
    noise, time = torch.randn(1, *model.latent_shape), torch.tensor(500)
    with torch.no_grad():
        torch.testing.assert_close(model.predict(noise, time, ours)[0], base.predict(noise, time, theirs)[0])


def test_the_benchmark_measures_its_shapes_with_adapters(monkeypatch, tmp_path):
    tiny = load_model(ModelSettings("tiny", str(tiny_sdxl_pipeline(tmp_path / "sdxl", depths=(1, 1)))))
    parts = {"unet": tiny.unet, "vae": tiny.vae, **tiny.text_encoders}
    small = replace(SHAPES["sdxl"], parts=lambda: copy.deepcopy(parts), side=64)
    monkeypatch.setitem(SHAPES, "sdxl", small)
    words = len(random_model("miniature", CPU, "float32").tokenizer)
    for part in tiny.text_encoders.values():
        part.resize_token_embeddings(words, mean_resizing=False)
    settings = BenchmarkSettings("sdxl", steps=1, warmup=1, instances=2, operations=False)
    learning = LearningSettings(prior=PriorSettings(pictures=1))
    bench = Bench(settings, PerformanceSettings(), CPU, "float32", learning, PenaltySettings())
    row = stage2_step(bench)
    assert row.seconds > 0 and row.notes["trainable"] == "adapters alone (lora, rank 16)"
    assert diffusers_step(bench).seconds > 0
