"""Stable Diffusion 3 behind the seam: joint attention read and bounded, rectified flow, prompts, a run."""

import copy
import json
import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from safetensors.torch import load_file
from terms import penalty
from test_learning import TRAINER, Watch
from tiny import a_step_of_each, moved_weights, small_road, tiny_sd3_pipeline, two_instances

from mifo.acceleration.block_attention import block_attention, block_mask
from mifo.acceleration.graphs import GraphedFunction
from mifo.acceleration.settings import PerformanceSettings
from mifo.backbones.joint.attention import joint_heads, joint_rule
from mifo.backbones.learned import load_learned
from mifo.backbones.loading import load_model, load_outline
from mifo.backbones.schedulers import flow_of
from mifo.backbones.settings import ModelSettings
from mifo.benchmark.rows import Bench, diffusers_step, stage2_step
from mifo.benchmark.settings import BenchmarkSettings
from mifo.benchmark.shapes import SHAPES, random_model
from mifo.data.settings import PriorSettings
from mifo.errors import MifoError
from mifo.method.backbone import Rule
from mifo.method.diffusion.flow import Flow, Timesteps
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.losses.settings import PenaltySettings
from mifo.method.objective import word_maps
from mifo.method.prompts.instances import PromptTokens, find_instances
from mifo.method.regions.grids import rasterise_boxes
from mifo.method.regions.rules import SubjectWords, region_rules
from mifo.method.synthesis.sampler import Sampler
from mifo.method.synthesis.settings import SynthesisSettings
from mifo.training.fit import learn
from mifo.training.settings import LearningSettings, StageSettings, constant

PROMPTS = ["a photo of a red car", "a cat in the snow"]
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}
SIZE, PIXELS, LENGTH = (8, 8), 64, 32 + 256
WHOLE = torch.clone


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return str(tiny_sd3_pipeline(tmp_path_factory.mktemp("sd3")))


@pytest.fixture(scope="module")
def pipeline(source):
    pipeline = StableDiffusion3Pipeline.from_pretrained(source, **WITHOUT_T5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def inputs(shared):
    noisy = torch.randn(2, *shared.latent_shape, generator=torch.Generator().manual_seed(1))
    return noisy, torch.tensor([300.0, 700.0]), shared.encode_prompts(PROMPTS)


@pytest.fixture
def rules():
    """Of a denoising pass of one sample: two overlapping boxes, words at 5 and at 7 and 8, "and" at 6."""
    tokens = PromptTokens({"a": (5,), "b": (7, 8)}, (4, 6), 9, LENGTH)
    words = SubjectWords.of(list(tokens.subjects.values()), tokens, torch.device("cpu"))
    boxes = [(0.0, 0.0, 0.625, 0.75), (0.5, 0.25, 1.0, 1.0)]
    return region_rules(lambda size: rasterise_boxes(boxes, size[0])[None], [SIZE], words, guidance=False)


# text


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_does(shared, pipeline):
    states, empty, pooled, empty_pooled = pipeline.encode_prompt(PROMPTS, None, None)
    found = shared.encode_prompts(["", "", *PROMPTS]).parts
    torch.testing.assert_close(found["states"], torch.cat([empty, states]))
    torch.testing.assert_close(found["pooled"], torch.cat([empty_pooled, pooled]))
    assert shared.words("a red car").length == states.shape[1] == LENGTH


@torch.no_grad()
def test_a_transformer_that_never_had_t5_gets_no_zeros_for_it(tmp_path):
    folder = tiny_sd3_pipeline(tmp_path / "sd3", t5=False)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **WITHOUT_T5)
    model = load_model(ModelSettings("tiny", str(folder)))
    expected = pipeline.encode_prompt(
        PROMPTS, None, None, max_sequence_length=0, do_classifier_free_guidance=False
    )[0]
    torch.testing.assert_close(model.encode_prompts(PROMPTS).parts["states"], expected)
    assert load_outline(ModelSettings("tiny", str(folder))).words("a car").length == 32


@torch.no_grad()
def test_t5_is_read_where_the_settings_ask_for_it(tmp_path, source):
    """Its states are the pipeline's; words have places for it, and a row of its table for each instance."""
    folder = tiny_sd3_pipeline(tmp_path / "sd3", third=True)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    expected = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    settings = ModelSettings("tiny", str(folder), t5=True)
    model = load_model(settings)
    found = model.encode_prompts(PROMPTS).parts
    torch.testing.assert_close(found["states"], expected[0])
    torch.testing.assert_close(found["pooled"], expected[2])
    assert found["states"][:, 32:].abs().sum() > 0
    assert load_model(ModelSettings("tiny", str(folder))).fingerprint != model.fingerprint
    model.add_words(["<asset0>"], ["red car"])
    assert {name: rows.shape[1] for name, rows in model.new_rows.items()} == {
        "text_encoder": 16,
        "text_encoder_2": 24,
        "text_encoder_3": 64,
    }
    prompt = "a photo of <asset0> and a red car"
    ids = model.tokenize([prompt])
    words = dict(model.words(prompt).words)
    assert words["<asset0>"] == (32 + 3, 4) and words["car"] == (32 + 7, 8) and words["and"] == (32 + 4, 5)
    assert model.places(ids[0], "<asset0>").tolist() == [4]
    assert ids[0, 2, 3] == model.tokenizer_3.convert_tokens_to_ids("<asset0>")
    model.set_trainable("full")
    learned = [name for name, each in model.text_encoder_3.named_parameters() if each.requires_grad]
    assert learned == ["shared.rows"]
    with torch.enable_grad():
        states = model.encode(ids).parts["states"]
        states[:, 32:].square().sum().backward()
    assert model.new_rows["text_encoder_3"].grad.any()
    assert load_outline(settings).words(prompt).length == found["states"].shape[1]
    with pytest.raises(MifoError, match="lacks tokenizer_3, text_encoder_3"):
        load_outline(ModelSettings("tiny", source, t5=True))
    with pytest.raises(MifoError, match=r"model\.t5=true is for models of Stable Diffusion 3"):
        load_outline(ModelSettings(t5=True))


def test_both_tables_learn_together(model):
    model.add_words(["<asset0>", "<asset1>"], ["car", None])
    model.set_trainable("tokens")
    ids = model.tokenize(["a photo of <asset0> and <asset1>"])
    parts = model.encode(ids).parts
    (parts["states"].square().sum() + parts["pooled"].square().sum()).backward()
    assert {name: rows.shape for name, rows in model.new_rows.items()} == {
        "text_encoder": (2, 16),
        "text_encoder_2": (2, 24),
    }
    assert all(rows.grad.any(1).all() for rows in model.new_rows.values())
    for i, (tokenizer, encoder) in enumerate(
        zip(model.tokenizers, model.text_encoders.values(), strict=True)
    ):  # the pooled state is that of the end, also behind new words of larger ids
        end = ids[0, i].tolist().index(tokenizer.eos_token_id)
        pooled = encoder.text_projection(encoder(ids[:, i]).last_hidden_state[:, end])
        torch.testing.assert_close(parts["pooled"].split([16, 24], -1)[i], pooled)


# the flow


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_times_and_steps_are_those_of_the_models_scheduler(pipeline, steps):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    flow = flow_of(scheduler)
    scheduler.set_timesteps(steps)
    times = flow.times(steps)
    torch.testing.assert_close(torch.tensor(times), scheduler.timesteps, rtol=1e-6, atol=0)
    ours = theirs = torch.randn(1, 4, 8, 8)
    for step, time in enumerate(scheduler.timesteps):
        velocity = torch.randn(1, 4, 8, 8)
        ours = flow.step(ours, velocity, times, step)
        theirs = scheduler.step(velocity, time, theirs).prev_sample
    torch.testing.assert_close(ours, theirs)


def test_noise_lies_on_a_straight_line_to_the_velocity_and_gates_read_sigma():
    flow = Flow(shift=3.0)
    clean, noise = torch.randn(2, 2, 4, 8, 8)
    times = torch.tensor([250.0, 1000.0])
    noisy = flow.add_noise(clean, noise, times)
    torch.testing.assert_close(noisy[0], 0.75 * clean[0] + 0.25 * noise[0])
    assert torch.equal(noisy[1], noise[1])
    back = torch.stack(
        [flow.step(noisy, flow.target(clean, noise, times), [t], 0)[i] for i, t in enumerate(times)]
    )
    torch.testing.assert_close(back, clean, atol=1e-5, rtol=1e-5)
    assert flow.share(times).tolist() == [0.25, 1.0]


@pytest.mark.parametrize("timesteps", list(Timesteps))
def test_times_of_learning_are_drawn_as_the_settings_say_and_shifted(timesteps):
    drawn = Flow(3.0, 1000, timesteps).draw_times(20_000, torch.Generator().manual_seed(0)) / 1000
    before = drawn / (3 - 2 * drawn)  # the shift undone
    if timesteps is Timesteps.logit_normal:
        before = torch.distributions.Normal(0, 1).cdf(before.logit())
    assert drawn.min() > 0 and drawn.max() < 1
    torch.testing.assert_close(
        before.sort().values, torch.linspace(0, 1, 20_000), atol=0.02, rtol=0
    )  # uniform


def test_other_ways_to_place_times_are_refused(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "copy")
    file = folder / "scheduler" / "scheduler_config.json"
    plain = json.loads(file.read_text())
    for change, reason in (
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting is True"),
        ({"_class_name": "DDIMScheduler"}, "class DDIMScheduler, where a rectified flow"),
    ):
        file.write_text(json.dumps(plain | change))
        with pytest.raises(MifoError, match=reason):
            load_outline(ModelSettings("copy", str(folder)))
    with pytest.raises(MifoError, match=r"model\.maps=all is not known; take one of own, row"):
        load_outline(ModelSettings("tiny", source, maps="all"))
    with pytest.raises(MifoError, match="1001 sampling steps"):
        Flow().times(1001)


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("transformer", {"joint_attention_dim": 32}, "joint_attention_dim .* is 32, .* needs at least 40"),
        ("transformer", {"pooled_projection_dim": 48}, "pooled_projection_dim .* is 48, .* needs 40"),
        ("transformer", {"caption_projection_dim": 24}, "caption_projection_dim .* is 24, .* needs 16"),
        ("vae", {"latent_channels": 16}, "in_channels .* is 4, where MIFO needs 16"),
        ("transformer", {"sample_size": 15}, "sample_size .* is 15, .* a multiple of the patches' side 2"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_weights_are_read(source, tmp_path, part, changes, reason):
    folder = shutil.copytree(source, tmp_path / "copy")
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(MifoError, match=reason):
        load_outline(ModelSettings("copy", str(folder)))


@torch.no_grad()
def test_plain_sampling_gives_the_pipelines_latents(shared, pipeline):
    noise = torch.randn(2, *shared.latent_shape, generator=torch.Generator().manual_seed(0))
    settings = SynthesisSettings(steps=4, guidance_scale=5.0)
    ours = Sampler(shared, settings, GuidanceSettings())(shared.encode_prompts(["", "", *PROMPTS]), noise)
    theirs = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=5.0, latents=noise, output_type="latent"
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    decoded = pipeline.vae.decode(theirs / 1.5 + 0.06).sample.div(2).add(0.5).clamp(0, 1)
    torch.testing.assert_close(shared.decode_latents(theirs), decoded)
    mean, _ = shared.encode_images([torch.rand(3, 32, 32)])
    assert mean.shape == (1, 4, 16, 16)


# attention


def dense(model, inputs, rule=None, site=None):
    """Probabilities (B, heads, n + L, n + L) of a site's layer in a plain pass, by one dense softmax."""
    found = []

    def look(attn, args, options):
        states, words = options["hidden_states"], options.get("encoder_hidden_states")
        query, key, _ = joint_heads(attn, states, words)
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if rule is not None:
            scores = scores.masked_fill(~rule.allowed()[:, None], -math.inf)
        found.append(scores)

    hook = model.transformer.get_submodule(site.name).register_forward_pre_hook(look, with_kwargs=True)
    model.transformer(inputs[0], *inputs[2].parts.values(), inputs[1])
    hook.remove()
    return found[0]


@torch.no_grad()
@pytest.mark.parametrize("maps", ["own", "row"])
def test_maps_are_those_of_dense_joint_attention(source, inputs, maps):
    model = load_model(ModelSettings("tiny", source, maps=maps))
    plain = model.predict(*inputs)[0]
    output, kept = model.predict(*inputs, dict.fromkeys(model.sites, WHOLE))
    torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-5)
    assert list(kept) == list(model.sites)
    for site, found in kept.items():
        scores = dense(model, inputs, site=site)[:, :, :PIXELS]
        keys = slice(PIXELS, None) if site.kind == "words" else slice(PIXELS)
        expected = scores.softmax(-1)[..., keys] if maps == "row" else scores[..., keys].softmax(-1)
        assert found.shape == (2, 2, PIXELS, LENGTH if site.kind == "words" else PIXELS)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_gradients_of_shares_are_those_of_a_dense_softmax(source, inputs, monkeypatch):
    """Whole rows are computed in pieces, which change nothing."""
    monkeypatch.setattr("mifo.backbones.joint.attention.QUERIES_AT_ONCE", 24)
    model = load_model(ModelSettings("tiny", source, maps="row"))
    site = model.sites[0]
    noisy = inputs[0].requires_grad_()

    def gradient(maps):
        return torch.autograd.grad(maps[..., [3, 7]].square().sum(), noisy)[0]

    _, kept = model.predict(*inputs, {site: WHOLE})
    expected = gradient(dense(model, inputs, site=site)[:, :, :PIXELS].softmax(-1)[..., PIXELS:])
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient(kept[site]), expected, rtol=1e-4, atol=1e-8)


def test_pixels_and_words_follow_the_rules_token_by_token(rules):
    boxes = [(range(6), range(5)), (range(2, 8), range(4, 8))]  # rows and columns of both
    owners = [
        {s for s, (ys, xs) in enumerate(boxes) if y in ys and x in xs} for y in range(8) for x in range(8)
    ]
    subjects, closed, end = {5: 0, 7: 1, 8: 1}, {4, 6}, 9

    def sees(half, query, key):
        if query < PIXELS and key < PIXELS:
            mine, other = owners[query], owners[key]
            return not mine or not other or bool(mine & other)
        if query < PIXELS:
            mine, token = owners[query], key - PIXELS
            if half == 0:
                return True  # the unconditional half sees every word
            if token in closed or (token == end and not mine):
                return False
            return token not in subjects or subjects[token] in mine
        if key < PIXELS and half == 1 and query - PIXELS in subjects:
            return not owners[key] or subjects[query - PIXELS] in owners[key]
        return True

    allowed = joint_rule(rules, SIZE).allowed()
    length = PIXELS + LENGTH
    assert allowed.shape == (2, length, length)
    seen = range(PIXELS + 12)  # beyond, all words are like the last
    for half in range(2):
        expected = torch.tensor([[sees(half, query, key) for key in seen] for query in seen])
        assert torch.equal(allowed[half, : len(seen), : len(seen)], expected)
    rest = slice(len(seen), None)
    assert torch.equal(allowed[:, :, rest], allowed[:, :, len(seen) - 1, None].expand_as(allowed[:, :, rest]))


@torch.no_grad()
def test_bounded_attention_obeys_the_rules_and_reads_see_them(shared, inputs, rules):
    """The first layer's maps under rules are those of a dense softmax over what the rules leave."""
    site = shared.sites[0]
    joint = joint_rule(rules, SIZE)
    _, kept = shared.predict(*inputs, dict.fromkeys(shared.sites, WHOLE), rules)
    scores = dense(shared, inputs, joint, site)[:, :, :PIXELS]
    for own, keys in ((site, slice(PIXELS, None)), (shared.sites[1], slice(PIXELS))):
        torch.testing.assert_close(kept[own], scores[..., keys].softmax(-1), rtol=0, atol=1e-5)
    closed = ~rules.words[SIZE].allowed()
    for found in (each for own, each in kept.items() if own.kind == "words"):
        assert (found.sum(1)[closed] == 0).all()


@torch.no_grad()
def test_a_bounded_word_moves_the_pixels_of_its_own_box_alone_in_one_layer(shared, inputs, rules):
    """And no word of another subject: the text queries of a subject are bounded too."""
    attn = shared.transformer.get_submodule(shared.sites[0].name)
    states = torch.randn(2, PIXELS, 16, generator=torch.Generator().manual_seed(2))
    words = torch.randn(2, LENGTH, 16, generator=torch.Generator().manual_seed(3))
    attentive = shared.attentive
    processors = attentive.processors({}, lambda *_: None, rules)
    moved_word, moved_pixel = words.clone(), states.clone()
    moved_word[:, 5] += 1
    inside = rasterise_boxes([(0.0, 0.0, 0.625, 0.75), (0.5, 0.25, 1.0, 1.0)], 8).flatten(1)
    only_first = inside[0] & ~inside[1]
    moved_pixel[:, only_first] += 1
    out, text = processors[0](attn, states, words)
    pixels, _ = processors[0](attn, states, moved_word)
    changed = (pixels - out).abs().amax(-1)[1] > 0
    assert torch.equal(changed, inside[0])
    _, told = processors[0](attn, moved_pixel, words)
    changed = (told - text).abs().amax(-1) > 0
    assert changed[1, 5] and not changed[1, 7] and not changed[1, 8] and changed[1, 0] and changed[0, 7]


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_block_masks_bound_as_biases_do(rules, rows):
    """Also where two samples share one row of bits."""
    joint = Rule(*(bits[-rows:] for bits in joint_rule(rules, SIZE)))
    query, key, value = torch.randn(3, 2, 2, PIXELS + LENGTH, 16, generator=torch.Generator().manual_seed(0))
    found = block_attention(query, key, value, block_mask(*joint, 2), 0.25)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=joint.allowed()[:, None], scale=0.25
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_maps_end_after_the_last_site_that_is_read_and_processors_return(shared, inputs):
    ran = []
    hook = shared.transformer.transformer_blocks[2].register_forward_pre_hook(lambda *_: ran.append("later"))
    before = list(shared.transformer.attn_processors.values())
    reads = dict.fromkeys([shared.sites[4], shared.sites[3]], WHOLE)
    maps = shared.maps(*inputs, reads)
    hook.remove()
    assert not ran and list(maps) == [shared.sites[3], shared.sites[4]]
    assert all(
        now is then for now, then in zip(shared.transformer.attn_processors.values(), before, strict=True)
    )


def test_checkpointing_changes_no_gradient(source, inputs):
    found = []
    for checkpointing in (False, True):
        model = load_model(ModelSettings("tiny", source, maps="row"))
        if checkpointing:
            model.enable_checkpointing()
        model.set_trainable("cross_attention_kv")
        model.transformer.train()
        reads = dict.fromkeys(model.default_sites.semantic, word_maps(torch.tensor([[3, 5]] * 2)))
        output, maps = model.predict(*inputs, reads)
        (output.sum() + sum(each.square().sum() for each in maps.values())).backward()
        learned = model.trainable("cross_attention_kv")["transformer"]
        assert len(learned) == 3 * 4 and all(".add_" in name for name in learned)
        found.append([parameter.grad for parameter in learned.values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_boxes_guide_bound_and_renew(shared):
    prompt = "a red car and a cat in the snow"
    boxes = {"red car": (0.0, 0.0, 0.5, 0.75), "cat": (0.5, 0.25, 1.0, 1.0)}
    guidance = GuidanceSettings(
        guided_steps=2,
        iterations=2,
        threshold=0.0,
        step_size_start=0.1,
        step_size_end=0.1,
        shapes_from=2,
        shapes_every=1,
    )
    sampler = Sampler(shared, SynthesisSettings(steps=3, guidance_scale=2.0), guidance)
    noise = torch.randn(1, *shared.latent_shape, generator=torch.Generator().manual_seed(0))
    reports = []
    conditioning = shared.encode_prompts(["", prompt])
    tokens = find_instances(prompt, list(boxes), shared.words)
    guided = sampler(conditioning, noise, boxes, tokens, on_step=reports.append)
    assert guided.isfinite().all() and not torch.allclose(guided, sampler(conditioning, noise))
    assert [len(report.losses) for report in reports] == [2, 2, 0]
    assert all(report.losses[1] < report.losses[0] for report in reports[:2])
    assert reports[0].shapes.shape == (1, 2, 8, 8)


def test_passes_replayed_from_graphs_are_the_same(shared, recordings):
    """Nothing in a pass waits for the device: rules, maps and times are tensors."""
    prompt = "a red car and a cat"
    boxes = {"red car": (0.0, 0.0, 0.5, 0.75), "cat": (0.5, 0.25, 1.0, 1.0)}
    guidance = GuidanceSettings(
        guided_steps=1, iterations=2, step_size_start=0.1, shapes_from=1, shapes_every=1
    )
    noise = torch.randn(1, *shared.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning, tokens = shared.encode_prompts(["", prompt]), find_instances(prompt, boxes, shared.words)
    plain, graphed = (
        Sampler(shared, SynthesisSettings(3, 2.0), guidance, partial(GraphedFunction, wanted=wanted))(
            conditioning, noise, boxes, tokens
        )
        for wanted in (False, True)
    )
    assert recordings.count == 2  # guidance and denoising
    torch.testing.assert_close(graphed, plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_block_masks_are_made_within_a_graph(rules, recordings):
    def blocks(*bits):
        mask = block_mask(*bits, 2)
        return mask.kv_num_blocks, mask.kv_indices

    joint = joint_rule(rules, SIZE)
    for found, expected in zip(recordings.capture(blocks, joint)(*joint), blocks(*joint), strict=True):
        assert torch.equal(found, expected)


# a run


def test_the_whole_road_of_a_run(mifo, photo, tmp_path):
    """Both stages with adapters and a prior, and pictures in boxes, on bfloat16 weights."""
    source = tiny_sd3_pipeline(tmp_path / "sd3", t5=False)
    assert mifo(*small_road(source, photo, tmp_path / "prior")) == 0
    learned = tmp_path / "run" / "learned"
    rows = load_file(learned / "tokens.safetensors")
    assert {name: each.shape for name, each in rows.items()} == {
        "rows": (2, 16),
        "rows.text_encoder_2": (2, 24),
    }
    model = load_model(ModelSettings("tiny", str(source)))
    load_learned(learned, model)
    adapters = load_file(learned / "transformer.safetensors")
    assert adapters.keys() == model.trainable("lora")["transformer"].keys()
    assert any("add_k_proj" in name for name in adapters) and all("lora_" in name for name in adapters)
    assert torch.equal(model.new_rows["text_encoder_2"], rows["rows.text_encoder_2"])
    assert (tmp_path / "run" / "pictures" / "pictures.json").is_file()
    assert next((tmp_path / "prior").rglob("*.png"))


@pytest.mark.parametrize("what", ["tokens", "cross_attention_kv", "denoiser", "full"])
def test_what_learned_is_saved_and_loaded_on_the_same_base_alone(source, tmp_path, what):
    """Words alone, keys and values of the prompt, the transformer, or all with both text encoders."""
    settings = a_step_of_each(what, tmp_path / "prior")
    model, base = (load_model(ModelSettings("tiny", source)) for _ in range(2))
    learned = learn(model, two_instances(), settings, penalty(), tmp_path, trainer=TRAINER)
    names = {part: set(each) for part, each in base.trainable(what).items()}
    for part, moved in moved_weights(base, model).items():
        assert moved <= names[part] and len(moved) >= 0.9 * len(names[part])
    load_learned(learned, base)
    prompt = ["a photo of <asset0> and <asset1>"]
    ours, theirs = (each.encode_prompts(prompt) for each in (model, base))
    for part in ours.parts:
        torch.testing.assert_close(ours.parts[part], theirs.parts[part])
    noise, time = torch.randn(1, *model.latent_shape), torch.tensor(500.0)
    with torch.no_grad():
        torch.testing.assert_close(model.predict(noise, time, ours)[0], base.predict(noise, time, ours)[0])
    other = tiny_sd3_pipeline(tmp_path / "other", t5=False)
    with pytest.raises(MifoError, match="was learned on tiny"):
        load_learned(learned, load_model(ModelSettings("other", str(other))))


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "length"), [(64, 333), (128, 512), (128, 64)])
def test_block_masks_bound_on_a_gpu_and_pass_gradients(width, length):
    """At the lengths of Stable Diffusion 3.5, FLUX.2 and Z-Image: 64² patches and words."""
    size = (64, 64)
    tokens = PromptTokens({"a": (5,), "b": (7, 8)}, (4, 6), 9, length)
    words = SubjectWords.of(list(tokens.subjects.values()), tokens, torch.device("cuda"))
    boxes = [(0.0, 0.0, 0.5, 0.75), (0.5, 0.25, 1.0, 1.0)]
    rules = region_rules(
        lambda size: rasterise_boxes(boxes, size[0], torch.device("cuda"))[None],
        [size],
        words,
        guidance=False,
    )
    joint = joint_rule(rules, size)
    for dtype, off in ((torch.float32, 1e-2), (torch.bfloat16, 2e-2)):
        inputs = torch.randn(3, 2, 4, 4096 + length, width, device="cuda", dtype=dtype).requires_grad_()
        grad = torch.randn(2, 4, 4096 + length, width, device="cuda", dtype=dtype)
        found = block_attention(*inputs, block_mask(*joint, 2), width**-0.5)
        expected = torch.nn.functional.scaled_dot_product_attention(
            *inputs, attn_mask=joint.allowed()[:, None], scale=width**-0.5
        )
        torch.testing.assert_close(found, expected, rtol=off, atol=off)
        ours, theirs = (torch.autograd.grad(each, inputs, grad)[0] for each in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=off, atol=5 * off)


def test_the_benchmark_measures_its_shapes_with_adapters(monkeypatch, model):
    parts = {"transformer": model.transformer, "vae": model.vae, **model.text_encoders}
    tiny = replace(SHAPES["sd35"], parts=lambda: copy.deepcopy(parts), side=32)
    monkeypatch.setitem(SHAPES, "sd35", tiny)
    words = len(random_model("miniature", torch.device("cpu"), "float32").tokenizer)
    for part in model.text_encoders.values():
        part.resize_token_embeddings(words, mean_resizing=False)
    settings = BenchmarkSettings("sd35", steps=1, warmup=1, instances=2, operations=False)
    learning = LearningSettings(prior=PriorSettings(pictures=1, steps=1))
    bench = Bench(
        settings, PerformanceSettings(), torch.device("cpu"), "float32", learning, PenaltySettings()
    )
    row = stage2_step(bench)
    assert row.seconds > 0 and row.notes["trainable"] == "adapters alone (lora, rank 16)"
    assert diffusers_step(bench).seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"autocast": False, "learning_precision": "bfloat16"}])
def test_learning_replayed_from_graphs_is_the_same(source, recordings, tmp_path, changes):
    found = {}
    for graphs in (False, True):
        settings = LearningSettings(
            semantic=StageSettings(steps=2),
            finetuning=StageSettings(steps=2, trainable="full", learning_rate=1e-4, lr_scheduler=constant()),
            prior=PriorSettings(pictures=1, steps=1, cache=str(tmp_path / "prior")),
        )
        performance = PerformanceSettings(
            **{"learning_precision": "float32", "cuda_graphs": graphs, "compile": False} | changes
        )
        model, watch = load_model(ModelSettings("tiny", source)), Watch()
        options = {"trainer": TRAINER, "callbacks": [watch], "performance": performance}
        learn(model, two_instances(), settings, penalty(), tmp_path / str(graphs), **options)
        found[graphs] = [loss for _, _, loss in watch.losses]
    assert recordings.count >= 2
    assert len(found[True]) == 4 and found[True] == pytest.approx(found[False], rel=2e-2 if changes else 1e-4)
