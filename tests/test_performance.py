"""Profiles: what each does, and that graphs, layouts and checkpointing leave the results alone."""

import copy
import gc
import logging
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from interpreted import run_in_interpreter
from terms import penalty
from test_learning import TRAINER, Watch
from test_synthesis import QUICK, boxes_of, run, sampler_of, tokens_of
from tiny import two_instances
from torch import nn
from torch.nn import functional as F
from vector_model import prompt

from mifo.acceleration import libraries, rehearsal
from mifo.acceleration.adamw_8bit import AdamW8bit, _levels
from mifo.acceleration.float8 import Float8Linear, keep_in_float8
from mifo.acceleration.graphs import GraphedFunction, GraphedStep
from mifo.acceleration.profile import available, check_performance, ready_for_synthesis
from mifo.acceleration.rounding import frozen_products
from mifo.acceleration.settings import PerformanceSettings
from mifo.backbones.attention import draws_in_training
from mifo.backbones.loading import load_model
from mifo.backbones.settings import ModelSettings
from mifo.config.checks import check
from mifo.config.compose import compose, settings_of
from mifo.data.settings import PriorSettings
from mifo.errors import MifoError
from mifo.making.class_pictures import class_pictures
from mifo.method.regions.rules import SubjectWords, region_rules
from mifo.training.fit import learn
from mifo.training.settings import LearningSettings, StageSettings, adamw, adamw_8bit
from mifo.training.stages import LearningStage

OPTIMIZERS = {"adamw": adamw, "adamw_8bit": adamw_8bit}
GRAPHS = partial(GraphedFunction, wanted=True)
PLAIN = PerformanceSettings(learning_precision="float32", synthesis_precision="float32")


@pytest.fixture
def losses(source, tmp_path_factory):
    """A function that learns a few steps of both stages by a profile and gives the loss of each step."""
    instances = two_instances()
    settings = LearningSettings(
        semantic=StageSettings(steps=4, checkpoint_every=0),
        finetuning=StageSettings(steps=3, trainable="full", learning_rate=1e-3, checkpoint_every=0),
        prior=PriorSettings(pictures=2, steps=2, cache=str(tmp_path_factory.getbasetemp() / "prior")),
    )
    terms = penalty(reward_steps=2, time_below=1.0)

    def learnt(performance, learning=settings, trainer=TRAINER, dtype="float32", load=load_model):
        watch, folder = Watch(), tmp_path_factory.mktemp("run")
        model = load(ModelSettings("tiny", source, dtype=dtype))
        options = {"trainer": trainer, "callbacks": [watch], "performance": performance}
        learn(model, instances, copy.deepcopy(learning), terms, folder, **options)
        return [loss for _, _, loss in watch.losses]

    learnt.settings, learnt.instances, learnt.penalty = settings, instances, terms
    return learnt


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_learning_replayed_from_graphs_is_the_same(losses, recordings, precision):
    settings = replace(PLAIN, learning_precision=precision)
    plain = losses(settings)
    assert recordings.count == 0
    assert losses(replace(settings, cuda_graphs=True)) == pytest.approx(plain, rel=1e-5)
    assert recordings.count == 3  # reward, penalty, fine-tuning
    assert not [each for each in gc.get_objects() if isinstance(each, GraphedStep)]


def test_a_killed_run_goes_on_from_graphs_to_the_same_result(source, losses, recordings, tmp_path):
    settings = copy.deepcopy(losses.settings)
    settings.semantic.checkpoint_every = settings.finetuning.checkpoint_every = 2

    def run(folder, kill=None, graphs=True):
        model = load_model(ModelSettings("tiny", source))
        options = {"trainer": TRAINER, "performance": replace(PLAIN, cuda_graphs=graphs)}
        options["callbacks"] = [Watch(kill)]
        learn(model, losses.instances, copy.deepcopy(settings), losses.penalty, folder, **options)
        parts = (model.unet, model.text_encoder)
        assert all(each.grad is None for part in parts for each in part.parameters())
        return [value for part in parts for value in part.state_dict().values()]

    whole = run(tmp_path / "whole")
    torch.testing.assert_close(run(tmp_path / "plain", graphs=False), whole, rtol=1e-4, atol=1e-5)
    for kill in (("semantic", 3), ("finetuning", 3)):
        folder = tmp_path / kill[0]
        with pytest.raises(RuntimeError, match="killed"):
            run(folder, kill)
        assert all(torch.equal(*pair) for pair in zip(run(folder), whole, strict=True))


@pytest.mark.parametrize("graphs", [True, False])
def test_nothing_of_a_run_stays_in_memory(source, losses, recordings, tmp_path, graphs):
    model = load_model(ModelSettings("tiny", source))
    settings = copy.deepcopy(losses.settings)
    performance = replace(PLAIN, cuda_graphs=graphs)
    learn(
        model, losses.instances, settings, losses.penalty, tmp_path, trainer=TRAINER, performance=performance
    )
    held, parameters = weakref.ref(model.unet), weakref.ref(model.unet.conv_in.weight)
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, LearningStage)]
    del model
    gc.collect()
    assert held() is None and parameters() is None


def test_gradients_of_a_step_are_laid_out_as_the_weights_and_apart(monkeypatch):
    monkeypatch.setattr("mifo.acceleration.graphs.capture", lambda function, inputs: function)
    weights = [nn.Parameter(torch.randn(3, 4)) for _ in range(3)] + [nn.Parameter(torch.ones(2))]
    weights[1] = nn.Parameter(torch.randn(4, 3).t())  # another layout; the first two get the same gradient

    def loss(x):
        return ((weights[0] + weights[1]) * x).sum() + weights[2].sum(), x.sum()

    x = torch.randn(3, 4)
    step = GraphedStep(loss, weights, wanted=True)
    total, beside = step(x)
    step.backward(total)
    assert not total.requires_grad and beside == x.sum()
    for weight, gradient in zip(weights[:3], (x, x, torch.ones(3, 4)), strict=True):
        assert torch.equal(weight.grad, gradient) and weight.grad.stride() == weight.stride()
    assert weights[3].grad is None
    assert len({each.grad.untyped_storage().data_ptr() for each in weights[:3]}) == 3


def test_layout_and_checkpointing_leave_learning_alone(losses):
    plain = losses(PLAIN)
    for key in ("channels_last", "gradient_checkpointing"):
        assert losses(replace(PLAIN, **{key: True})) == pytest.approx(plain, rel=1e-4), key


def test_compiled_blocks_leave_learning_alone(losses, recordings, monkeypatch):
    pytest.importorskip("peft")
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **options: compiled(*args, backend="eager", **options)
    )
    count = torch._dynamo.utils.counters["stats"]
    adapted = copy.deepcopy(losses.settings)
    adapted.finetuning.trainable = "lora"
    for options, settings in (
        ({"gradient_checkpointing": True}, adapted),
        ({"learning_precision": "bfloat16"}, losses.settings),
    ):
        plain = losses(replace(PLAIN, **options), settings)
        torch._dynamo.reset()
        count.clear()
        compiled_too = losses(replace(PLAIN, compile=True, **options), settings)
        assert compiled_too == pytest.approx(plain, rel=1e-4), options
        assert count["unique_graphs"] >= 3  # kinds of blocks


def test_half_precision_stays_near_full_precision(losses):
    half = losses(replace(PLAIN, learning_precision="bfloat16"))
    assert half == pytest.approx(losses(PLAIN), rel=0.05)
    assert half != losses(PLAIN)


def test_frozen_weights_rounded_once_give_what_autocast_gives(losses, monkeypatch):
    rounded = []

    def spied(module):
        found = frozen_products(module)
        rounded.append({name.split(".")[0] for name in found})
        return found

    bfloat16 = replace(PLAIN, learning_precision="bfloat16")
    monkeypatch.setattr("mifo.training.stages.frozen_products", spied)
    once = losses(bfloat16)
    # reward and penalty of the first stage; in the second everything learns
    assert rounded == [{"unet", "text_encoder"}] * 2 + [set()]
    monkeypatch.setattr("mifo.training.stages.frozen_products", lambda module: {})
    assert losses(bfloat16) == once


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_passes_wholly_in_bfloat16_learn_the_same(losses, recordings, optimizer):
    settings = copy.deepcopy(losses.settings)
    settings.finetuning.optimizer = OPTIMIZERS[optimizer]()
    whole = replace(PLAIN, learning_precision="bfloat16", autocast=False)
    plain = losses(PLAIN, settings)
    eager = losses(whole, settings)
    assert eager == pytest.approx(plain, rel=0.05) and eager != plain
    assert recordings.count == 0
    assert losses(replace(whole, cuda_graphs=True), settings) == pytest.approx(eager, rel=1e-3)
    assert recordings.count == 3  # reward, penalty, fine-tuning


def test_copies_follow_the_weights_and_gradients_come_from_them(losses, source, tmp_path):
    """Each step must read what the last one wrote, and the small steps must not be lost to rounding."""
    model = load_model(ModelSettings("tiny", source))
    before = model.unet.conv_in.weight.detach().clone()
    seen = []

    class Compare(Watch):
        def on_train_batch_end(self, trainer, module, *args):
            super().on_train_batch_end(trainer, module, *args)
            if module.stage == "finetuning":
                seen.append(
                    all(torch.equal(copy, each.to(torch.bfloat16)) for each, copy in module._copies.items())
                )
                assert len(module._copies) > 100

    settings = copy.deepcopy(losses.settings)
    settings.finetuning.learning_rate = 1e-5
    performance = replace(PLAIN, learning_precision="bfloat16", autocast=False)
    options = {"trainer": TRAINER, "callbacks": [Compare()], "performance": performance}
    learn(model, losses.instances, settings, losses.penalty, tmp_path, **options)
    assert seen == [True] * 3
    moved = (model.unet.conv_in.weight - before).abs()
    assert model.unet.conv_in.weight.dtype == torch.float32
    assert 0 < moved.max() < 4e-5 and (moved > 0).float().mean() > 0.9


@pytest.mark.parametrize("file", ["one_box", "two_boxes"])
@pytest.mark.parametrize("subjects", ["boxes", "plain"])
def test_synthesis_replayed_from_graphs_is_the_same(vectors, vector_unet, recordings, file, subjects):
    v = vectors(f"synthesis_{file}")
    boxes = boxes_of(v) if subjects == "boxes" else {}
    plain = run(vector_unet, v, boxes)
    assert recordings.count == 0
    replayed = run(vector_unet, v, boxes, accelerate=GRAPHS)
    torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-4)
    # with boxes a guidance and a denoising pass
    assert recordings.count == (1 if subjects == "plain" else 2)


@pytest.mark.parametrize("subjects", ["boxes", "plain"])
def test_graphs_go_on_from_one_prompt_to_the_next(vectors, vector_unet, recordings, subjects):
    v = vectors("synthesis_one_box")  # two samples
    first = boxes_of(v) if subjects == "boxes" else {}
    moved = dict.fromkeys(first, (0.1, 0.4, 0.6, 0.9))
    other = v | {
        "encoder_hidden_states": v["encoder_hidden_states"].roll(5, 2),
        "filter_indices": v["filter_indices"][:1] + 2,
        "eos_index": v["eos_index"] + 2,
        "subject0_token_indices": v["subject0_token_indices"] + 3,
    }
    states = v["encoder_hidden_states"].clone()
    # processors round last bits differently: k-means may decide otherwise, and guidance multiplies them
    wanted, guidance = [(v, first), (other, moved)], replace(QUICK, guided_steps=2, shapes_every=0)
    apart = [run(vector_unet, *each, guidance) for each in wanted]
    near = 1e-2 if first else 1e-4
    assert (apart[0] - apart[1]).abs().max() > 20 * near
    kept = sampler_of(vector_unet, guidance, accelerate=GRAPHS)
    for each, alone in zip(wanted, apart, strict=True):
        together = run(vector_unet, *each, sampler=kept)
        torch.testing.assert_close(together, alone, rtol=0, atol=near)
    assert recordings.count == (2 if first else 1)
    assert torch.equal(v["encoder_hidden_states"], states)
    # one sample after two is another form
    one = {"text_states": states[::2].contiguous(), "latents": v["initial_latents"][:1]}
    alone = run(vector_unet, v, {}, guidance, **one)
    torch.testing.assert_close(run(vector_unet, v, {}, sampler=kept, **one), alone, rtol=1e-4, atol=1e-4)
    assert recordings.count == (3 if first else 2)


def test_replayed_masks_follow_the_shapes(vectors, vector_unet, recordings):
    v = vectors("synthesis_two_boxes")
    tokens, predictions = tokens_of(v), {}
    words = SubjectWords.of(list(tokens.subjects.values()), tokens, torch.device("cpu"))

    def halves(first, size):
        left = (torch.arange(size[1]) < size[1] // 2).expand(size)
        return torch.stack([left, ~left] if first == "left" else [~left, left])[None]

    for graphs in (False, True):
        sampler = sampler_of(vector_unet, accelerate=GRAPHS if graphs else None)
        sizes = {site.size for site in sampler.backbone.sites}
        for first in ("left", "right"):
            rules = region_rules(partial(halves, first), sizes, words, guidance=False)
            inputs = v["initial_latents"], torch.tensor(500), prompt(v["encoder_hidden_states"]), rules, None
            with torch.no_grad():
                predictions[graphs, first] = sampler.prediction(*inputs)[0].clone()
    for first in ("left", "right"):
        torch.testing.assert_close(predictions[True, first], predictions[False, first], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predictions[True, "left"], predictions[True, "right"])
    assert recordings.count == 1


def test_class_pictures_are_rounded_as_learning_is(source, tmp_path):
    model = load_model(ModelSettings("tiny", source))
    prompts = ["a photo of a car", "a photo of a cat"]

    def made(name, **changes):
        settings = PriorSettings(pictures=3, steps=2, cache=str(tmp_path / name), batch_size=2)
        found, told = class_pictures(model, prompts, settings, 0, replace(PLAIN, **changes))
        return torch.stack([*found.read(range(len(told)))])

    plain = made("plain")
    rounded = (made("rounded", learning_precision="bfloat16") - plain).abs()
    assert 0 < rounded.mean() < 0.01


def test_a_graph_that_cannot_be_captured_is_an_ordinary_call_told_once(monkeypatch, caplog):
    def broken(*args, **options):
        try:
            raise KeyError("handled")
        except KeyError:
            try:
                raise RuntimeError("capture failed\nlong story")
            finally:
                raise RuntimeError("something failed before")  # as the end of a capture tells

    monkeypatch.setattr("mifo.acceleration.graphs.capture", broken)
    layer = nn.Linear(2, 2)
    graphed = GraphedFunction(layer, wanted=True)
    x = torch.ones(1, 2)
    assert torch.equal(graphed(x), layer(x)) and torch.equal(graphed(2 * x), layer(2 * x))
    step = GraphedStep(lambda x: (layer(x).sum(), None), list(layer.parameters()), wanted=True)
    for scale in (1, 2):
        layer.zero_grad()
        step.backward(step(scale * x)[0])
        assert torch.equal(layer.weight.grad, torch.full((2, 2), float(scale)))
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2 and all("capture failed" in each for each in messages)
    assert not any("long story" in each for each in messages)


def test_what_the_machine_lacks_is_left_out_in_one_line(monkeypatch, caplog):
    monkeypatch.setattr("mifo.acceleration.profile._compiles", lambda device: False)
    wanted = PerformanceSettings(name="mine", cuda_graphs=True, compile=True, learning_precision="float16")
    with caplog.at_level(logging.WARNING):
        resolved = available(wanted, "cpu")
        assert available(wanted, "cpu") == resolved  # and says nothing again
    assert not resolved.cuda_graphs and not resolved.compile
    assert resolved.learning_precision == resolved.synthesis_precision == "float32"
    (record,) = caplog.records
    assert "performance=mine goes on without CUDA graphs and compiled blocks" in record.message


def test_the_automatic_profile_is_the_fastest_that_fits(monkeypatch):
    auto = PerformanceSettings(name="auto")
    max_speed = settings_of(compose("benchmark", ["performance=max_speed", "paths.output=x"])).performance
    assert available(auto, "cpu") == available(PerformanceSettings(), "cpu")
    for has_bfloat16 in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bfloat16: has)
        fastest = available(auto, "cuda")
        assert (fastest.name == "max_speed") == has_bfloat16
        graphs = PerformanceSettings(cuda_graphs=True)
        assert fastest == available(max_speed if has_bfloat16 else graphs, "cuda")
        typed = replace(auto, gradient_checkpointing=True)
        assert available(typed, "cuda") == available(replace(graphs, gradient_checkpointing=True), "cuda")
        assert available(auto, "cuda", torch.bfloat16) == available(graphs, "cuda")


def test_synthesis_in_half_precision_stays_near_full_precision(source, vectors, vector_unet):
    v = vectors("synthesis_two_boxes")
    # without guidance, whose descent on random weights lets the least difference grow
    masks_only = replace(QUICK, guided_steps=0, shapes_every=0)
    plain = run(vector_unet, v, boxes_of(v), masks_only)
    states = v["encoder_hidden_states"].bfloat16()
    half = run(vector_unet.to(torch.bfloat16), v, boxes_of(v), masks_only, text_states=states)
    assert half.dtype == torch.float32
    assert (half - plain).abs().mean() < 0.1 * plain.abs().mean()
    model = load_model(ModelSettings("tiny", source))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    image = model.decode_latents(latents)
    ready_for_synthesis(model, replace(PLAIN, synthesis_precision="bfloat16", channels_last=True))
    assert model.dtype == model.vae.dtype == torch.bfloat16 and model.text_encoder.dtype == torch.float32
    rounded = model.decode_latents(latents)
    assert rounded.dtype == torch.float32 and (rounded - image).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"learning_precision": "fp16"}, "performance.learning_precision=fp16"),
        ({"synthesis_precision": "half"}, "performance.synthesis_precision=half"),
        ({"matmul_precision": "low"}, "performance.matmul_precision=low"),
        ({"float8": True}, "performance.float8 saves memory only with performance.gradient_checkpointing"),
        ({"gradient_checkpointing": True, "autocast": False}, "excludes performance.autocast=false"),
        ({"autocast": False, "learning_precision": "float16"}, "performance.autocast=false needs"),
    ],
)
def test_impossible_profiles_are_refused(change, sentence):
    with pytest.raises(MifoError, match=sentence):
        check_performance(PerformanceSettings(**change))


def test_weights_that_learn_are_not_kept_in_8_bits():
    """Refused with the configuration, before a model is loaded."""
    given = ["performance=low_vram", "performance.float8=true", "paths.output=out"]
    check(settings_of(compose("learn", given)))
    with pytest.raises(MifoError, match=r"trainable=full learns weights that performance\.float8 keeps"):
        check(settings_of(compose("learn", [*given, "learning.finetuning.trainable=full"])))


@pytest.mark.parametrize("task", ["learn", "run", "synthesize"])
@pytest.mark.parametrize("name", ["default", "max_speed", "low_vram", "reference"])
def test_every_profile_serves_every_task(task, name):
    given = ["learned=folder"] if task == "synthesize" else []
    settings = settings_of(compose(task, ["paths.output=here", f"performance={name}", *given]))
    check_performance(settings.performance)
    assert settings.performance.name == name
    assert (settings.model.dtype == "bfloat16") == (name == "low_vram")
    if task != "synthesize":
        assert (settings.learning.finetuning.trainable == "lora") == (name == "low_vram")


def regressed(optimizer_class, steps=120):
    """Losses of a small network under an optimiser, and the optimiser."""
    torch.manual_seed(0)
    x, network = torch.randn(256, 64), nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    y = x @ torch.randn(64, 64)
    optimizer = optimizer_class(network.parameters(), lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (network(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


def test_8_bit_states_learn_as_32_bit_states_do():
    exact, _ = regressed(torch.optim.AdamW)
    losses, optimizer = regressed(AdamW8bit)
    assert losses == pytest.approx(exact, rel=0.05) and losses[-1] < 0.2 * losses[0]
    assert losses[:2] == pytest.approx(exact[:2], rel=1e-6) and losses != exact
    # two moments of one byte each and a scale of four bytes for 256 numbers
    for parameter, state in optimizer.state.items():
        kept = sum(each.nbytes for each in state.values() if isinstance(each, torch.Tensor))
        number = parameter.numel()
        assert kept == (8 * number if number < 4096 else 2 * (number + 4 * number // 256))


def test_8_bit_states_round_to_a_small_part_of_their_block():
    weight = nn.Parameter(torch.zeros(64, 256))
    optimizer = AdamW8bit([weight], lr=0.0, betas=(0.0, 0.0), eps=1e-8, weight_decay=0.0)
    # from a block's largest number down to a hundredth of it
    weight.grad = torch.logspace(0, -2, 256).repeat(64, 1) * torch.randn(64, 1)
    optimizer.step()
    state = optimizer.state[weight]
    for name, moment in (("exp_avg", weight.grad), ("exp_avg_sq", weight.grad.square())):
        levels = _levels(name, torch.device("cpu"))[0]
        read = levels[state[name].long()] * state[f"{name}_scale"]
        assert len(levels.unique()) == 256 and levels.max() == 1
        distances = (levels - (moment / state[f"{name}_scale"])[..., None]).abs()
        torch.testing.assert_close((read - moment).abs() / state[f"{name}_scale"], distances.amin(-1))
        assert ((read - moment).abs() <= 0.13 * moment.abs()).float().mean() > 0.97


def test_8_bit_states_go_on_from_a_checkpoint(tmp_path):
    def step(parameter, optimizer):
        parameter.grad = parameter.detach().cos()
        optimizer.step()

    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
    weight = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    optimizer = AdamW8bit([weight], **options)
    for _ in range(3):
        step(weight, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "states.pt")
    again = nn.Parameter(weight.detach().clone())
    resumed = AdamW8bit([again], **options)
    resumed.load_state_dict(torch.load(tmp_path / "states.pt", weights_only=True))
    assert resumed.state[again]["exp_avg"].dtype == torch.uint8
    for parameter, each in ((weight, optimizer), (again, resumed)):
        step(parameter, each)
    assert torch.equal(weight, again)


KERNEL = """
import torch, triton, triton.language as tl
from torch import nn
import mifo.acceleration.adamw_8bit as adamw
import mifo.acceleration.adamw_kernel as kernel


def learnt(fused, dtype):
    adamw.has_kernels = lambda device: fused
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(*shape) * 0.1) for shape in ((64, 256), (10,), (5000,))]
    weights.append(nn.Parameter((torch.randn(8, 64, 4, 4) * 0.1).to(memory_format=torch.channels_last)))
    optimizer = adamw.AdamW8bit(weights, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=1e-2)
    if dtype != torch.float32:
        optimizer.copies = {each: each.detach().to(dtype) for each in weights}
        for each in weights:
            each.grad_dtype = dtype
    for step in range(4):
        optimizer.grad_scale = torch.tensor(1.5) if step % 2 else None
        for each in weights:
            each.grad = (torch.randn(each.shape) * torch.randn(each.shape).exp() ** 3).to(dtype)
        optimizer.step()
    return weights, optimizer

@triton.jit
def encode(values, codes, SIGNED: tl.constexpr, COUNT: tl.constexpr):
    tl.store(codes + tl.arange(0, COUNT), kernel._encode(tl.load(values + tl.arange(0, COUNT)), SIGNED))

for name in adamw.MOMENTS:
    levels, borders = adamw._levels(name, torch.device("cpu"))
    aside = levels.diff() * 1e-4
    values = torch.cat([levels, borders - aside, borders + aside, torch.zeros(258)])
    codes = torch.empty(len(values), dtype=torch.uint8)
    encode[(1,)](values, codes, name == "exp_avg", len(values))
    assert torch.equal(codes, torch.bucketize(values, borders).to(torch.uint8)), name

for dtype in (torch.float32, torch.bfloat16):
    plain, fused = learnt(False, dtype), learnt(True, dtype)
    for a, b in zip(plain[0], fused[0]):
        print(a.shape, (a - b).abs().max())
        # steps of 1e-2; a moment at the border of two levels may fall on either side
        assert ((a - b).abs() < 1e-5).float().mean() > 0.99 and (a - b).abs().max() < 1e-2
        assert plain[1].state[a].keys() == fused[1].state[b].keys()
        for name, value in plain[1].state[a].items():
            if torch.is_tensor(value):
                other = fused[1].state[b][name]
                assert value.dtype == other.dtype and value.stride() == other.stride()
                near = torch.isclose(value.float(), other.float(), rtol=1e-4, atol=1e-6)
                assert near.float().mean() > 0.99
        if dtype != torch.float32:  # the interpreter cuts where a GPU rounds
            torch.testing.assert_close(fused[1].copies[b], b.detach().to(dtype), rtol=1e-2, atol=0)
"""


def test_the_optimisers_kernel_does_what_plain_pytorch_does():
    if not hasattr(torch.nn.Parameter(torch.ones(1)), "grad_dtype"):
        pytest.skip("gradients of another precision come with PyTorch 2.10")
    run_in_interpreter(KERNEL)


@pytest.mark.gpu
def test_the_optimisers_kernel_on_a_gpu():
    torch.manual_seed(0)
    plain = [
        nn.Parameter(torch.randn(512, 256, device="cuda")),
        nn.Parameter(torch.randn(3000, device="cuda")),
    ]
    fused = [nn.Parameter(each.detach().clone()) for each in plain]
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 1e-2}
    one, other = AdamW8bit(plain, **options), AdamW8bit(fused, **options)
    other.copies = {each: each.detach().bfloat16() for each in fused}
    for _ in range(5):
        for a, b in zip(plain, fused, strict=True):
            a.grad = torch.randn_like(a).bfloat16().float()
            b.grad_dtype = torch.bfloat16
            b.grad = a.grad.bfloat16()
        other.step()
        one.grad_scale = torch.ones((), device="cuda")
        for parameter in plain:
            state = one.state[parameter]
            state["step"] = state.get("step", 0) + 1
            with torch.no_grad():
                one._update(parameter, one.param_groups[0])
    for a, b in zip(plain, fused, strict=True):
        # steps of 1e-2; a moment at the border of two levels may fall on either side
        assert ((a - b).abs() < 1e-4).float().mean() > 0.99 and (a - b).abs().max() < 1e-2
        assert torch.equal(other.copies[b], b.detach().bfloat16())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_libraries_are_loaded_ahead_only_for_a_gpu(device, caplog):
    caplog.set_level("DEBUG", "mifo.acceleration.libraries")
    before = set(threading.enumerate())
    libraries.load_libraries(torch.device(device))
    begun = set(threading.enumerate()) - before
    assert bool(begun) <= (device == "cuda")
    for thread in begun:
        thread.join()
    assert not caplog.records


def test_libraries_that_do_not_load_stop_nothing(monkeypatch, caplog):
    def fail(*args: object) -> None:
        raise RuntimeError("no such library")

    caplog.set_level("DEBUG", "mifo.acceleration.libraries")
    monkeypatch.setattr(torch.cuda, "Stream", fail)
    libraries._load(torch.device("cuda"))
    assert "no such library" in caplog.text


def test_tasks_without_a_model_do_not_wait_for_diffusers():
    code = "import sys, mifo.commands.evaluate, mifo.commands.dashboard; sys.exit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_rehearsal_passes_through_what_learning_uses_and_draws_nothing(monkeypatch):
    used = set()

    def watched(name, function):
        monkeypatch.setattr(F, name, lambda *args, **kwargs: used.add(name) or function(*args, **kwargs))

    for name in ("conv2d", "linear", "layer_norm", "group_norm", "scaled_dot_product_attention", "silu"):
        watched(name, getattr(F, name))
    monkeypatch.setattr(rehearsal, "_SIDE", 8)
    before = torch.random.get_rng_state()
    rehearsal.rehearse(torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(used) == 6


def test_what_is_computed_a_second_time_finds_the_kernels_of_the_first(source, losses):
    """On a GPU other kernels of attention keep other tensors, which checkpointing refuses."""
    seen = []

    def watch(*_):
        seen.append(tuple(torch._C._get_sdp_priority_order()))

    def load(settings, *args):
        model = load_model(settings, *args)
        model.text_encoder.encoder.layers[0].layer_norm1.register_forward_pre_hook(watch)
        return model

    losses(replace(PLAIN, gradient_checkpointing=True), load=load)
    assert len(seen) >= 2 * 7 and len(set(seen)) == 1  # that of the class pictures may come first


def test_a_network_draws_in_training_where_a_dropout_is_on(source):
    model = load_model(ModelSettings("tiny", source))
    layer = model.text_encoder.encoder.layers[0].self_attn
    assert not draws_in_training(model.unet) and not draws_in_training(model.text_encoder)
    layer.dropout = 0.1
    model.unet.mid_block.resnets[0].dropout = nn.Dropout(0.1)
    assert draws_in_training(model.unet) and draws_in_training(model.text_encoder)


def test_whole_weights_go_one_by_one_as_they_are_kept_in_8_bits(monkeypatch):
    network = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(4, 4) for _ in range(4))})
    whole = [weakref.ref(each.weight) for each in network["blocks"]]
    left, made = [], Float8Linear.__init__

    def counted(self, layer):
        left.append(sum(each() is not None for each in whole))
        made(self, layer)

    monkeypatch.setattr(Float8Linear, "__init__", counted)
    keep_in_float8(network)
    assert left == [4, 3, 2, 1]


def test_low_vram_learns(losses):
    pytest.importorskip("peft")
    small = copy.deepcopy(losses.settings)
    small.finetuning.trainable = "lora"
    low = replace(PLAIN, learning_precision="bfloat16", gradient_checkpointing=True)
    whole = losses(PLAIN, small)
    assert losses(low, small, dtype="bfloat16") == pytest.approx(whole, rel=0.05)
