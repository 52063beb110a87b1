"""FLUX.2 [klein] and Z-Image behind the seam: as diffusers' pipelines have them, read, bounded, learned."""

import copy
import json
import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, ZImagePipeline
from diffusers.models.transformers import transformer_flux2, transformer_z_image
from safetensors.torch import load_file, save_file
from terms import one_term, penalty
from test_export import export, save
from test_learning import TRAINER, Watch
from tiny import small_road, tiny_flux2_pipeline, tiny_z_image_pipeline, two_instances
from transformers import Qwen3Config, Qwen3Model

from mifo.acceleration.graphs import GraphedFunction
from mifo.acceleration.profile import ready_for_learning, ready_for_synthesis
from mifo.acceleration.settings import PerformanceSettings
from mifo.backbones.joint.attention import joint_rule
from mifo.backbones.learned import load_learned
from mifo.backbones.loading import load_model, load_outline
from mifo.backbones.settings import ModelSettings
from mifo.backbones.shapes import load_shapes
from mifo.benchmark.rows import Bench, diffusers_step, picture, stage1_step, stage2_step
from mifo.benchmark.settings import BenchmarkSettings
from mifo.benchmark.shapes import SHAPES
from mifo.data.learning_data import LearningData
from mifo.data.settings import PriorSettings
from mifo.errors import MifoError
from mifo.making.together import Together
from mifo.method.backbone import Conditioning
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.losses.settings import PenaltySettings
from mifo.method.objective import word_maps
from mifo.method.prompts.instances import find_instances
from mifo.method.regions.grids import rasterise_boxes
from mifo.method.regions.rules import SubjectWords, region_rules
from mifo.method.synthesis.sampler import Sampler
from mifo.method.synthesis.settings import SynthesisSettings
from mifo.training.fit import learn
from mifo.training.memory import RESERVE, learning_memory
from mifo.training.settings import LearningSettings, StageSettings, constant

# the second is longer than Z-Image's 32 tokens, so that a batch of both has padding
PROMPTS = ["a photo of a red car", "a cat in the snow with another cat and many things beyond"]
BOXES = {"red car": (0.0, 0.0, 0.5, 0.75), "cat": (0.5, 0.25, 1.0, 1.0)}
TOGETHER = "a photo of a red car and a cat"
PIXELS = 64
WHOLE = torch.clone
SHORT = LearningSettings(
    semantic=StageSettings(steps=1),
    finetuning=StageSettings(steps=1, learning_rate=1e-2, lr_scheduler=constant()),
)


class Flux2:
    """What the tests know of FLUX.2: its pipeline, and the order of its sequence."""

    make, pipeline, module = staticmethod(tiny_flux2_pipeline), Flux2KleinPipeline, transformer_flux2
    refined = ()  # numbers of the calls of attention among words alone

    @staticmethod
    def states(pipeline, prompts):
        return list(pipeline.encode_prompt(prompts)[0])

    @staticmethod
    def sample(pipeline, prompts, noise, steps, scale):
        pipeline.register_to_config(is_distilled=False)
        return pipeline(
            prompt=prompts,
            num_inference_steps=steps,
            guidance_scale=scale,
            **{"height": 32, "width": 32, "latents": noise},
            output_type="latent",
        ).images

    @staticmethod
    def pixels_first(states, dimension):
        words = states.shape[dimension] - PIXELS
        return torch.cat(states.split([words, PIXELS], dimension)[::-1], dimension)

    @staticmethod
    def pixels_last(states, dimension):
        return torch.cat(states.split([PIXELS, states.shape[dimension] - PIXELS], dimension)[::-1], dimension)


class ZImage:
    make, pipeline, module = staticmethod(tiny_z_image_pipeline), ZImagePipeline, transformer_z_image
    refined = (1,)
    pixels_first = pixels_last = staticmethod(lambda states, dimension: states)

    @staticmethod
    def states(pipeline, prompts):
        return pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)[0]

    @staticmethod
    def sample(pipeline, prompts, noise, steps, scale):
        return pipeline(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=scale - 1,  # which counts from 0
            **{"height": 32, "width": 32, "latents": noise},
            output_type="latent",
        ).images


@pytest.fixture(scope="module", params=[Flux2, ZImage], ids=["flux2", "z_image"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def source(family, tmp_path_factory) -> str:
    return str(family.make(tmp_path_factory.mktemp("family") / "tiny"))


@pytest.fixture(scope="module")
def pipeline(family, source):
    pipeline = family.pipeline.from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def inputs(shared):
    noisy = torch.randn(2, *shared.latent_shape, generator=torch.Generator().manual_seed(1))
    return noisy, torch.tensor([300.0, 700.0]), shared.encode_prompts(PROMPTS)


def noise_for(model, count=1):
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def rules_of(model, prompt=TOGETHER, boxes=BOXES, halves=True):
    """Of a denoising pass of one sample."""
    tokens = find_instances(prompt, list(boxes), model.words)
    words = SubjectWords.of(list(tokens.subjects.values()), tokens, torch.device("cpu"))
    shapes = rasterise_boxes(list(boxes.values()), 8)[None]
    return region_rules(lambda size: shapes, [(8, 8)], words, guidance=False, halves=halves)


# as the pipelines have it


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_does(family, shared, pipeline):
    found = shared.encode_prompts(PROMPTS).parts
    for prompt, ours, theirs in zip(PROMPTS, found["states"], family.states(pipeline, PROMPTS), strict=True):
        torch.testing.assert_close(ours[: len(theirs)], theirs)
        assert shared.words(prompt).length == (512 if family is Flux2 else 32 * math.ceil(len(theirs) / 32))
    if family is ZImage:
        assert found["lengths"].tolist() == [21, 50] and found["states"].shape[1] == 64


def test_words_stand_where_the_template_puts_them(shared):
    found = shared.words("A photo of a red car, user!")
    ids = shared.tokenize(["A photo of a red car, user!"])[0, 0]
    told = {text: shared.tokenizer.decode(ids[list(places)]).strip() for text, places in found.words}
    assert told.pop("a") in ("A", "a") and told == {
        each: each for each in ("photo", "of", "red", "car", ",", "user", "!")
    }
    assert shared.tokenizer.decode(ids[found.end]) == "<|im_end|>"
    with pytest.raises(MifoError, match="tokens with its template, 512 fit the model; shorten it"):
        shared.words("unknown " * 100)
    with pytest.raises(MifoError, match="shorten it"):
        shared.tokenize(["unknown " * 100])


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1] * 2, PROMPTS[1:] * 2])
def test_z_images_layers_give_what_the_transformers_own_call_gives(tmp_path, prompts, autocast):
    """In learning, too, where the lengths of prompts are not known on the processor."""
    model = load_model(ModelSettings("tiny", str(tiny_z_image_pipeline(tmp_path / "tiny"))))
    noise, time = noise_for(model, 2), torch.tensor([300.0, 700.0])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        conditioning = model.encode_prompts(prompts)
        states, lengths = conditioning.parts["states"], conditioning.parts["lengths"].tolist()
        told = [own[:length] for own, length in zip(states, lengths, strict=True)]
        expected = model.transformer(list(noise[:, :, None]), 1 - time / 1000, told).sample
        for each in (conditioning, model.encode(model.tokenize(prompts))):
            found = model.predict(noise, time, each)[0]
            torch.testing.assert_close(found, -torch.stack(expected)[:, :, 0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_plain_sampling_gives_the_pipelines_latents_and_pictures(family, shared, pipeline, scale):
    noise, sampler = noise_for(shared, 2), Sampler(shared, SynthesisSettings(4, scale), GuidanceSettings())
    ours = sampler(shared.encode_prompts(["", "", *PROMPTS]), noise)
    theirs = family.sample(pipeline, PROMPTS, noise, 4, scale)
    spread, shift = shared.level
    torch.testing.assert_close(shared.unpacked(ours / spread + shift) if family is Flux2 else ours, theirs)
    codes = theirs if family is Flux2 else theirs / 1.5 + 0.06
    pictures = pipeline.vae.decode(codes).sample.div(2).add(0.5).clamp(0, 1)
    torch.testing.assert_close(shared.decode_latents(ours), pictures)


@torch.no_grad()
def test_pictures_become_the_pipelines_latents_and_back(family, shared, pipeline):
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, deviation = shared.encode_images([image])
    assert mean.shape == deviation.shape == (1, *shared.latent_shape)
    if family is Flux2:
        torch.testing.assert_close(mean, pipeline._encode_vae_image(image[None] * 2 - 1, None))
    posterior = pipeline.vae.encode(image[None] * 2 - 1).latent_dist
    spread, shift = shared.level
    torch.testing.assert_close(shared.unpacked(mean / spread + shift), posterior.mean)
    torch.testing.assert_close(shared.unpacked(deviation / spread), posterior.std)


def test_unconditional_passes_are_not_made_where_they_would_not_count(shared, monkeypatch):
    rows, predict = [], type(shared).predict
    monkeypatch.setattr(
        type(shared), "predict", lambda self, *given: rows.append(len(given[0])) or predict(self, *given)
    )
    for scale in (1.0, 2.0):
        sampler = Sampler(shared, SynthesisSettings(1, scale), GuidanceSettings(guided_steps=0))
        tokens = find_instances(TOGETHER, list(BOXES), shared.words)
        sampler(shared.encode_prompts(["", TOGETHER]), noise_for(shared), BOXES, tokens)
    assert rows == [1, 2]


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("dynamic", [False, True])
def test_times_are_those_of_the_models_scheduler(family, source, tmp_path, steps, dynamic):
    folder = shutil.copytree(source, tmp_path / "copy")
    changes = {"use_dynamic_shifting": dynamic, "shift": 6.0}
    edit(folder / "scheduler" / "scheduler_config.json", changes)
    flow = load_outline(ModelSettings("copy", str(folder))).process
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    if family is Flux2:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        level = compute_empirical_mu(PIXELS, steps)
    else:
        from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift

        level = calculate_shift(PIXELS)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=level)
    torch.testing.assert_close(torch.tensor(flow.times(steps)), scheduler.timesteps, rtol=1e-5, atol=0)
    if family is Flux2 and dynamic:  # learning knows no steps: the shift of a great number of them
        assert flow.shift == pytest.approx(math.exp(compute_empirical_mu(PIXELS, 200)))


def test_a_strength_of_guidance_is_read_where_the_model_embeds_it(tmp_path):
    folder = tiny_flux2_pipeline(tmp_path / "embedded", embedded=True)
    weak, strong = (load_model(ModelSettings("tiny", str(folder), guidance=each)) for each in (1.0, 4.0))
    conditioning, noise, time = strong.encode_prompts(PROMPTS[:1]), noise_for(strong), torch.tensor(500.0)
    ids = {"img_ids": torch.cartesian_prod(*map(torch.arange, (1, 8, 8, 1)))}
    ids["txt_ids"] = torch.cartesian_prod(*map(torch.arange, (1, 1, 1, 512)))
    with torch.no_grad():
        expected = strong.transformer(
            noise.flatten(2).mT,
            conditioning.parts["states"],
            time[None] / 1000,
            guidance=torch.ones(1),
            **ids,
        ).sample
        found = weak.predict(noise, time, conditioning)[0]
        assert not torch.allclose(found, strong.predict(noise, time, conditioning)[0])
    torch.testing.assert_close(found.flatten(2).mT, expected)
    assert weak.sampling() != strong.sampling()


# new words


def test_new_rows_learn_through_all_layers_whatever_the_profile_does(source, monkeypatch):
    prompt, found = "a photo of <asset0> and <asset1>", []
    compiled, graphs = torch.compile, torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(
        torch, "compile", lambda *args, **options: compiled(*args, backend="eager", **options)
    )
    torch._dynamo.reset()
    graphs.clear()
    for profile in ({}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "compile": True}):
        model = load_model(ModelSettings("tiny", source))
        model.add_words(["<asset0>", "<asset1>", "<asset2>"], ["red car", None, None])
        ready_for_learning(model, PerformanceSettings("mine", **profile))
        assert not graphs["unique_graphs"]
        model.set_trainable("tokens")
        model.transformer.train()
        model.text_encoder.train()
        ids = model.tokenize([prompt])
        conditioning = model.encode(ids)
        place = int(model.places(ids[0], "<asset1>"))
        assert dict(model.words(prompt).words)["<asset1>"] == (place,)
        reads = dict.fromkeys(model.default_sites.semantic, word_maps(torch.tensor([[place]])))
        output, maps = model.predict(noise_for(model), torch.tensor(500.0), conditioning, reads)
        (output.square().sum() + sum(each.square().sum() for each in maps.values())).backward()
        (rows,) = model.new_rows.values()
        assert rows.shape == (3, 16) and rows.grad[:2].any(1).all() and not rows.grad[2].any()
        assert not any(each.grad is not None for each in model.text_encoder.layers.parameters())
        found.append(rows.grad)
    assert graphs["unique_graphs"] >= 2  # layers of the language model, and what lies between attentions
    for each in found[1:]:
        torch.testing.assert_close(each, found[0])


# attention


@pytest.fixture
def seen(family, monkeypatch):
    """Queries, keys and masks of diffusers' own processors, pixels first, by call; masks to put on them."""
    calls, masks = [], []
    dispatch = family.module.dispatch_attention_fn

    def watched(query, key, value, attn_mask=None, **options):
        calls.append([family.pixels_first(each, 1).transpose(1, 2) for each in (query, key)] + [attn_mask])
        if masks and (mask := masks[len(calls) - 1]) is not None:
            attn_mask = mask
        return dispatch(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(family.module, "dispatch_attention_fn", watched)
    return calls, masks


def layers(family, calls):
    return [each for number, each in enumerate(calls) if number not in family.refined]


@torch.no_grad()
@pytest.mark.parametrize("maps", ["own", "row"])
def test_maps_are_those_of_dense_joint_attention(family, source, inputs, seen, maps):
    model = load_model(ModelSettings("tiny", source, maps=maps))
    plain = model.predict(*inputs)[0]
    calls = layers(family, seen[0])
    output, kept = model.predict(*inputs, dict.fromkeys(model.sites, WHOLE))
    torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-5)
    assert list(kept) == list(model.sites) and len(calls) == len(model.attentive.layers)
    for sites, (query, key, mask) in zip(model.attentive.layers, calls, strict=True):
        scores = (query @ key.mT / math.sqrt(query.shape[-1]))[:, :, :PIXELS]
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        for site in sites:
            keys = slice(PIXELS, None) if site.kind == "words" else slice(PIXELS)
            expected = scores.softmax(-1)[..., keys] if maps == "row" else scores[..., keys].softmax(-1)
            torch.testing.assert_close(kept[site], expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("negative", ["", PROMPTS[1]])
def test_a_bounded_pass_is_diffusers_own_pass_with_the_rules_as_masks(family, shared, seen, negative):
    """Also beside a longer negative prompt, whose further words the rules do not know."""
    rules = rules_of(shared)
    noise, time = noise_for(shared, 2), torch.tensor(600.0)
    conditioning = shared.encode_prompts([negative, TOGETHER])
    maps = shared.predict(noise, time, conditioning, dict.fromkeys(shared.sites, WHOLE), rules)
    seen[0].clear()
    shared.predict(noise, time, conditioning)
    allowed = joint_rule(rules, (8, 8)).allowed()
    length = max(each[0].shape[2] for each in seen[0])
    missing = length - allowed.shape[-1]
    allowed = torch.nn.functional.pad(allowed, (0, missing, 0, missing), value=True)
    pixels = rules.pixels[8, 8].allowed()
    for query, _, mask in list(seen[0]):
        full = query.shape[2] == length
        joint = allowed if mask is None or not full else allowed & mask[:, 0]
        bound = family.pixels_last(family.pixels_last(joint, 1), 2) if full else pixels
        seen[1].append(None if len(seen[1]) in family.refined else bound[:, None])
    count = len(seen[0])
    seen[0].clear()
    expected = shared.predict(noise, time, conditioning)[0]
    assert len(seen[0]) == count
    torch.testing.assert_close(maps[0], expected, rtol=1e-5, atol=1e-5)
    for sites, (query, key, mask) in zip(shared.attentive.layers, layers(family, seen[0]), strict=True):
        scores = (query @ key.mT / math.sqrt(query.shape[-1]))[:, :, :PIXELS]
        closed = ~(allowed if len(sites) > 1 else pixels)[:, None, :PIXELS]
        if mask is not None:
            closed = closed | ~mask
        scores = scores.masked_fill(closed, -math.inf)
        for site in sites:
            keys = slice(PIXELS, None) if site.kind == "words" else slice(PIXELS)
            torch.testing.assert_close(maps[1][site], scores[..., keys].softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_boxes_guide_bound_and_renew(shared, source, scale):
    changes = {"threshold": 0.0, "step_size_start": 0.1, "step_size_end": 0.1}
    guidance = GuidanceSettings(guided_steps=2, iterations=2, shapes_from=2, shapes_every=1, **changes)
    sampler = Sampler(shared, SynthesisSettings(3, scale), guidance)
    noise, reports = noise_for(shared), []
    conditioning = shared.encode_prompts(["", TOGETHER])
    tokens = find_instances(TOGETHER, list(BOXES), shared.words)
    guided = sampler(conditioning, noise, BOXES, tokens, on_step=reports.append)
    assert guided.isfinite().all() and not torch.allclose(guided, sampler(conditioning, noise))
    assert [len(report.losses) for report in reports] == [2, 2, 0]
    assert all(report.losses[1] < report.losses[0] for report in reports[:2])
    assert reports[0].shapes.shape == (1, 2, 8, 8)
    twice = load_model(ModelSettings("tiny", source))
    low = PerformanceSettings(synthesis_precision="float32", gradient_checkpointing=True)
    ready_for_synthesis(twice, low)  # with activations computed twice, in less memory
    again = Sampler(twice, SynthesisSettings(3, scale), guidance)(conditioning, noise, BOXES, tokens)
    torch.testing.assert_close(again, guided, rtol=1e-4, atol=1e-4)


def test_passes_replayed_from_graphs_are_the_same(family, shared, recordings):
    """For other prompts too; a longer one for Z-Image is captured anew."""
    guidance = GuidanceSettings(guided_steps=1, iterations=2, step_size_start=0.1, shapes_from=1)
    plain, graphed = (
        Sampler(shared, SynthesisSettings(2, 2.0), guidance, partial(GraphedFunction, wanted=wanted))
        for wanted in (False, True)
    )
    noise, long = noise_for(shared), f"{TOGETHER} in the snow with many things beyond"
    for negative, prompt, captured in (
        ("", TOGETHER, 2),
        ("a photo", "a cat and a red car", 2),
        ("", long, 4),
        ("a photo of a car", long.replace("snow", "red"), 4),
        (PROMPTS[1], TOGETHER, 6),
    ):
        tokens = find_instances(prompt, BOXES, shared.words)
        conditioning = shared.encode_prompts([negative, prompt])
        expected, found = (each(conditioning, noise, BOXES, tokens) for each in (plain, graphed))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert recordings.count == (captured if family is ZImage else 2)


@torch.no_grad()
@pytest.mark.parametrize("learning", [True, False])
def test_a_graph_serves_prompts_of_other_lengths_and_shortens_none(family, shared, recordings, learning):
    graphed = GraphedFunction(lambda *inputs: shared.predict(*inputs)[0], wanted=True)
    noise, time = noise_for(shared, 2), torch.tensor([300.0, 700.0])
    for prompts, captured in (
        (PROMPTS, 1),
        (["a cat", PROMPTS[1] + " the red car"], 1),
        (PROMPTS[::-1], 1 if learning else 2),  # which samples are masked is known but in learning
        (["", "a cat"], 2 if learning else 3),
        (["a car", ""], 2 if learning else 3),
    ):
        encode = (lambda told: shared.encode(shared.tokenize(told))) if learning else shared.encode_prompts
        expected = [  # alone, with no mask
            shared.predict(noise[i : i + 1], time[i : i + 1], shared.encode_prompts([prompt]))[0]
            for i, prompt in enumerate(prompts)
        ]
        torch.testing.assert_close(graphed(noise, time, encode(prompts)), torch.cat(expected))
        assert recordings.count == (captured if family is ZImage else 1)


@torch.no_grad()
def test_instances_learned_apart_act_in_their_boxes(source):
    """Where the rules know fewer words than the prompt is padded to, too."""
    base, other = (load_model(ModelSettings("tiny", source)) for _ in range(2))
    for model in (base, other):
        model.add_words(["<asset0>", "<asset1>"])
    for each in other.transformer.parameters():
        each.mul_(1.1)
    prompt, boxes = (
        "a photo of <asset0> and <asset1>",
        dict(zip(["<asset0>", "<asset1>"], BOXES.values(), strict=True)),
    )
    noise, time = noise_for(base), torch.tensor(500.0)
    both = Together([base, other], {"<asset0>": 0, "<asset1>": 1})
    rules = rules_of(base, prompt, boxes, halves=False)
    found = both.predict(noise, time, both.encode_prompts([prompt]), None, rules)[0]
    ours, theirs = (  # of a prompt in which the member's own words come first
        each.predict(noise, time, Conditioning(both._encoded(i, each, [prompt])), None, rules)[0]
        for i, each in enumerate((base, other))
    )
    inside = torch.nn.functional.interpolate(
        rasterise_boxes([boxes["<asset1>"]], 8)[None].float(), noise.shape[-2:]
    ).bool()
    torch.testing.assert_close(found, torch.where(inside, theirs, ours))


# loading


def edit(file, changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_does_not_fit_is_refused_before_weights_are_read(family, source, tmp_path):
    flux2 = family is Flux2
    states = "joint_attention_dim" if flux2 else "cap_feat_dim"
    wrong = [
        ("transformer", {states: 40}, rf"{states} .* is 40, where MIFO needs {48 if flux2 else 16}"),
        ("transformer", {"in_channels": 8}, "in_channels .* is 8"),
        ("vae", {"sample_size": None}, "vae/config.json is damaged: sample_size holds"),
        ("scheduler", {"shift_terminal": 0.02}, "shift_terminal is 0.02"),
        ("text_encoder", {"architectures": ["Qwen2Model"]}, "is Qwen2Model, where MIFO needs Qwen3Model"),
    ]
    if flux2:
        wrong.append(
            (
                "text_encoder",
                {"num_hidden_layers": 27, "layer_types": None},
                "is 27, where MIFO needs at least 28",
            )
        )
    else:
        wrong.append(("transformer", {"axes_dims": [4, 4, 4]}, "dim .* is 32, where MIFO needs 24"))
    for number, (part, changes, reason) in enumerate(wrong):
        folder = shutil.copytree(source, tmp_path / str(number))
        edit(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), changes)
        with pytest.raises(MifoError, match=reason):
            load_outline(ModelSettings("copy", str(folder)))
    step = 4 if flux2 else 32
    with pytest.raises(
        MifoError, match=rf"pictures of 30 pixels .* set model\.side to a multiple of {step}\."
    ):
        load_outline(ModelSettings("tiny", source, side=30))
    assert load_outline(ModelSettings("tiny", source, side=64)).latent_shape[-1] == (16 if flux2 else 32)
    folder = shutil.copytree(source, tmp_path / "template")
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(MifoError, match=r"lacks the chat template; add chat_template\.jinja"):
        load_outline(ModelSettings("copy", str(folder)))


def test_a_pipeline_whose_text_encoder_is_saved_without_its_head_is_the_same(
    family, source, pipeline, tmp_path
):
    folder = shutil.copytree(source, tmp_path / "copy")
    pipeline.text_encoder.model.save_pretrained(folder / "text_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    edit(folder / "model_index.json", {"text_encoder": ["transformers", "Qwen3Model"]})
    assert index["text_encoder"][1] == "Qwen3ForCausalLM"
    ours, theirs = (load_model(ModelSettings("tiny", str(each))) for each in (folder, source))
    with torch.no_grad():
        states = [each.encode_prompts(PROMPTS).parts["states"] for each in (ours, theirs)]
    assert torch.equal(*states)


def test_others_words_and_loras_are_put_on_the_model(source, tmp_path):
    """In the form of diffusers' trainers."""
    save_file({"emb": torch.full((16,), 0.5)}, tmp_path / "word.safetensors")
    base = load_model(ModelSettings("tiny", source))
    name = next(
        name
        for name, each in base.transformer.named_modules()
        if isinstance(each, torch.nn.Linear) and name.endswith("to_q") and "refiner" not in name
    )
    layer, generator = base.transformer.get_submodule(name), torch.Generator().manual_seed(0)
    down = torch.randn(2, layer.in_features, generator=generator)
    up = torch.randn(layer.out_features, 2, generator=generator)
    lora = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    save_file(lora, tmp_path / "lora.safetensors")
    words = {"<mine>": str(tmp_path / "word.safetensors")}
    model = load_model(
        ModelSettings("tiny", source, words=words, lora=str(tmp_path / "lora.safetensors"), lora_scale=0.5)
    )
    expected = layer.weight + 0.5 * up @ down
    torch.testing.assert_close(model.transformer.get_submodule(name).weight, expected)
    row = model.text_encoder.embed_tokens.weight[model.tokenizer.convert_tokens_to_ids("<mine>")]
    assert torch.equal(row, torch.full((16,), 0.5))
    assert len(dict(model.words("a photo of <mine>").words)["<mine>"]) == 1
    with pytest.raises(MifoError, match="the word 'car', which the model knows already"):
        load_outline(ModelSettings("tiny", source, words={"car": words["<mine>"]}))


# learning


@pytest.mark.parametrize("what", ["tokens", "cross_attention_kv", "denoiser", "full"])
def test_what_learned_is_saved_and_loaded_on_the_same_base_alone(family, source, tmp_path, what):
    """The transformer learns as a whole or in part; of the language model nothing but the new rows."""
    steps = 0 if what == "tokens" else 1
    finetuning = StageSettings(steps=steps, trainable=what, learning_rate=1e-2, lr_scheduler=constant())
    prior = PriorSettings(pictures=1, steps=1, guidance_scale=1, cache=str(tmp_path / "prior"))
    settings = LearningSettings(semantic=StageSettings(steps=1), finetuning=finetuning, prior=prior)
    model, base = (load_model(ModelSettings("tiny", source)) for _ in range(2))
    learned = learn(model, two_instances(), settings, penalty(), tmp_path, trainer=TRAINER)
    names = set(base.trainable(what)["transformer"])
    now = dict(model.transformer.named_parameters())
    moved = {name for name, each in base.transformer.named_parameters() if not torch.equal(each, now[name])}
    assert moved <= names and len(moved) >= 0.8 * len(names)
    assert not base.trainable(what)["text_encoder"]
    load_learned(learned, base)
    prompt = ["a photo of <asset0> and <asset1>"]
    with torch.no_grad():
        ours, theirs = (each.encode_prompts(prompt) for each in (model, base))
        torch.testing.assert_close(ours.parts["states"], theirs.parts["states"])
        noise, time = noise_for(model), torch.tensor(500.0)
        torch.testing.assert_close(model.predict(noise, time, ours)[0], base.predict(noise, time, ours)[0])
    other = shutil.copytree(source, tmp_path / "other")
    edit(other / "vae" / "config.json", {"batch_norm_eps": 0.1} if family is Flux2 else {"shift_factor": 0.1})
    with pytest.raises(MifoError, match="was learned on tiny"):
        load_learned(learned, load_model(ModelSettings("other", str(other))))


LONG = "a photo of {} in the snow with things"  # of one instance it has less than 32 tokens, of two more


@pytest.mark.parametrize(
    ("template", "told"),
    [("a photo of {}", "a {class}"), (LONG, "a {class}"), ("a photo of {}", f"{PROMPTS[1]} a {{class}}")],
)
def test_learning_replayed_from_graphs_is_the_same(source, tmp_path, recordings, template, told):
    """One graph a stage, though prompts differ in length, with padding too."""
    prior = PriorSettings(
        pictures=2, steps=1, guidance_scale=1, prompts=[told], cache=str(tmp_path / "prior")
    )
    settings = LearningSettings(
        template=template,
        semantic=StageSettings(steps=4, learning_rate=1e-2),
        finetuning=replace(SHORT.finetuning, steps=4, trainable="lora"),
        prior=prior,
    )
    losses = []
    for graphs in (False, True):
        watch, model = Watch(), load_model(ModelSettings("tiny", source))
        performance = PerformanceSettings("graphs", learning_precision="float32", cuda_graphs=graphs)
        options = {"trainer": TRAINER, "callbacks": [watch], "performance": performance}
        folder = tmp_path / str(graphs)
        learn(model, two_instances(), copy.deepcopy(settings), one_term("penalty"), folder, **options)
        losses.append([loss for _, _, loss in watch.losses])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert recordings.count == 2


def test_prompts_of_a_run_are_as_long_as_the_longest_and_never_cut(family, source):
    model, instances = load_model(ModelSettings("tiny", source)), two_instances()
    model.add_words(instances.tokens)
    data = LearningData(model, instances, LearningSettings(template=LONG), 1, 1, {(8, 8)}, 0)
    data.setup("fit")
    length = 64 if family is ZImage else 512
    for longest in (data._longest, data._longest[..., :32]):  # should another prompt be longer after all
        data._longest, shapes = longest, set()
        for step in range(8):
            ids = data.draw(step).ids
            shapes.add(ids.shape[-1])
            words = [each for each in instances.tokens if len(model.places(ids[0], each))]
            own = model.tokenize([LONG.format(" and ".join(words))])
            assert (ids >= 0).sum() == (own >= 0).sum()
        assert shapes == ({32, 64} if family is ZImage and longest.shape[-1] == 32 else {length})


def test_the_whole_road_of_a_run(mifo, source, photo, tmp_path, capsys):
    """Both stages with adapters and a prior, pictures in boxes, scores; in bfloat16, activations twice."""
    road = small_road(source, photo, tmp_path / "prior")
    road.remove("metrics=none")
    road += ["metrics=miniature", "learning.prior.guidance_scale=1", "synthesis.guidance_scale=1"]
    assert mifo(*road) == 0
    learned = tmp_path / "run" / "learned"
    assert load_file(learned / "tokens.safetensors")["rows"].shape == (2, 16)
    adapters = load_file(learned / "transformer.safetensors")
    model = load_model(ModelSettings("tiny", source))
    load_learned(learned, model)
    assert adapters.keys() == model.trainable("lora")["transformer"].keys()
    assert any(each.any() for name, each in adapters.items() if "lora_B" in name)
    assert not (learned / "text_encoder.safetensors").exists()
    assert (tmp_path / "run" / "pictures" / "pictures.json").is_file()
    assert list((tmp_path / "run").rglob("scores.json"))
    assert next((tmp_path / "prior").rglob("*.png"))


def test_a_distilled_model_is_sampled_without_guidance(mifo, photo, tmp_path, capsys):
    source = tiny_flux2_pipeline(tmp_path / "flux2")
    road = small_road(source, photo, tmp_path / "prior")
    for given, key in (([], "learning.prior"), (["learning.prior.guidance_scale=1"], "synthesis")):
        assert mifo(*road, *given) == 2
        told = f"{key}.guidance_scale=7.5 is for models with classifier-free guidance"
        assert told in " ".join(capsys.readouterr().err.split())
    assert load_outline(ModelSettings("tiny", str(source))).distilled
    free = tiny_flux2_pipeline(tmp_path / "base", distilled=False)
    load_outline(ModelSettings("tiny", str(free))).check_scale("synthesis.guidance_scale", 7.5)


def test_weights_in_8_bits_teach_words_and_adapters(source, tmp_path):
    """The transformer's and the language model's; what learned fits the plain base model."""
    finetuning = StageSettings(steps=1, trainable="lora", learning_rate=1e-2, lr_scheduler=constant())
    prior = PriorSettings(pictures=1, steps=1, guidance_scale=1, cache=str(tmp_path / "prior"))
    settings = LearningSettings(semantic=StageSettings(steps=1), finetuning=finetuning, prior=prior)
    performance = PerformanceSettings(learning_precision="bfloat16", gradient_checkpointing=True, float8=True)
    model, base = (load_model(ModelSettings("tiny", source, dtype="bfloat16")) for _ in range(2))
    options = {"trainer": {**TRAINER, "precision": "bf16-mixed"}, "performance": performance}
    learned = learn(model, two_instances(), settings, penalty(), tmp_path, **options)
    load_learned(learned, base)
    for network, other in zip(model.networks.values(), base.networks.values(), strict=True):
        stored = [each for each in network.parameters() if each.dtype == torch.float8_e4m3fn]
        weights = [each for each in other.parameters() if each.dim() > 1]
        assert len(stored) > len(weights) / 3 and not any(each.requires_grad for each in stored)
    assert any(each.any() for name, each in base.trainable("lora")["transformer"].items() if "B" in name)
    with torch.no_grad():
        states, noise = base.encode_prompts(["a photo of <asset0>"]), noise_for(base)
        ours, theirs = (each.predict(noise, torch.tensor(500.0), states)[0] for each in (model, base))
        assert 0 < (ours - theirs).norm() < 0.1 * theirs.norm()
    settings.finetuning.trainable = "denoiser"
    with pytest.raises(MifoError, match=r"trainable=denoiser learns weights that performance\.float8 keeps"):
        learn(base, two_instances(), settings, penalty(), tmp_path / "other", **options)


def test_memory_is_counted_without_weights(source):
    shapes = load_shapes(ModelSettings("tiny", source, dtype="bfloat16"))
    shapes.add_words(["<asset0>"])
    shapes.add_lora(4)
    settings = copy.deepcopy(SHORT)
    settings.finetuning.trainable = "lora"
    plain, half = (
        learning_memory(shapes, settings, PerformanceSettings(learning_precision="bfloat16", float8=float8))
        for float8 in (False, True)
    )
    assert plain.total - plain.weights == half.total - half.weights > RESERVE
    assert plain.weights / 2 < half.weights < plain.weights


@pytest.mark.slow
def test_the_benchmark_measures_its_shapes(family, source, monkeypatch):
    """Steps of both stages, the second of adapters, and a picture in two boxes, in bfloat16."""
    shapes = "flux2_klein" if family is Flux2 else "z_image"
    made = []

    def parts():
        model = load_model(ModelSettings("tiny", source))
        config = model.text_encoder.config.to_dict() | {"vocab_size": 300}
        text_encoder = Qwen3Model(Qwen3Config.from_dict(config))
        made.append(text_encoder.dtype)
        transformer = type(model.transformer).from_config(model.transformer.config)
        return {"transformer": transformer, "vae": model.vae, "text_encoder": text_encoder}

    monkeypatch.setitem(SHAPES, shapes, replace(SHAPES[shapes], parts=parts, side=32))
    learning = LearningSettings(prior=PriorSettings(pictures=1, steps=1))
    settings = BenchmarkSettings(shapes, steps=1, warmup=1, repeats=1, instances=2, operations=False)
    performance = PerformanceSettings(
        "low_vram",
        learning_precision="bfloat16",
        synthesis_precision="bfloat16",
        gradient_checkpointing=True,
    )
    bench = Bench(settings, performance, torch.device("cpu"), "bfloat16", learning, PenaltySettings())
    first, second, theirs, made_picture = (
        row(bench) for row in (stage1_step, stage2_step, diffusers_step, picture)
    )
    assert min(first.seconds, second.seconds, theirs.seconds, made_picture.seconds) > 0
    assert second.notes["trainable"] == "adapters alone (lora, rank 16)"
    assert made_picture.notes["steps"] == (4 if family is Flux2 else 8)
    assert set(made) == {torch.bfloat16} and torch.get_default_dtype() == torch.float32


@torch.no_grad()
def test_half_precision_is_the_pipelines(family, source):
    """The places of words keep 32 bits."""
    pipeline = family.pipeline.from_pretrained(source, dtype=torch.bfloat16)
    model = load_model(ModelSettings("tiny", source, dtype="bfloat16"))
    for ours, theirs in zip(
        model.encode_prompts(PROMPTS).parts["states"], family.states(pipeline, PROMPTS), strict=True
    ):
        assert torch.equal(ours[: len(theirs)], theirs)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("what", ["lora", "tokens"])
def test_a_result_is_exported_as_a_pipeline_that_predicts_the_same(family, mifo, source, tmp_path, what):
    save(tmp_path, source, what)
    assert export(mifo, source, "weights=pipeline", folder="P") == 0
    exported = tmp_path / "P" / "exported" / "pipeline"
    pipeline = family.pipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    model = load_model(ModelSettings("tiny", source))
    load_learned(tmp_path / "learned", model)
    prompt, noise = "a photo of <asset1> and <asset0>", noise_for(model)
    states = model.encode_prompts([prompt]).parts["states"][0]
    theirs = family.states(pipeline, [prompt])[0]
    torch.testing.assert_close(states[: len(theirs)], theirs, atol=1e-4, rtol=1e-3)
    sampler = Sampler(model, SynthesisSettings(2, 1.0), GuidanceSettings())
    pictures = model.decode_latents(sampler(model.encode_prompts(["", prompt]), noise))
    codes = family.sample(pipeline, [prompt], noise, 2, 1.0)
    codes = codes if family is Flux2 else codes / 1.5 + 0.06
    found = pipeline.vae.decode(codes).sample.div(2).add(0.5).clamp(0, 1)
    torch.testing.assert_close(found, pictures, atol=1e-3, rtol=1e-3)
    if family is Flux2:
        assert json.loads((exported / "model_index.json").read_text())["is_distilled"] is True
