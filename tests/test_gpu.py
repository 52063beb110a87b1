"""What only a GPU can show: passes really captured, with kernels in them, give what plain code gives."""

import logging
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from terms import penalty
from test_learning import TRAINER, Watch
from test_synthesis import PROCESS, QUICK, boxes_of, run, sampler_of
from tiny import two_instances

from mifo.acceleration.channels_last import keep_channels_last
from mifo.acceleration.graphs import GraphedFunction
from mifo.acceleration.settings import PerformanceSettings
from mifo.backbones.loading import load_model
from mifo.backbones.settings import ModelSettings
from mifo.config.compose import compose, settings_of
from mifo.data.settings import PriorSettings
from mifo.training.fit import learn
from mifo.training.settings import LearningSettings, StageSettings, adamw, adamw_8bit

OPTIMIZERS = {"adamw": adamw, "adamw_8bit": adamw_8bit}

pytestmark = pytest.mark.gpu

FLOAT32 = PerformanceSettings(
    matmul_precision="highest", learning_precision="float32", synthesis_precision="float32"
)
FASTEST = settings_of(compose("benchmark", ["performance=max_speed", "paths.output=unused"])).performance


@pytest.fixture(autouse=True)
def captured(caplog):
    """No test passes by going on without a graph."""
    caplog.set_level(logging.WARNING)
    yield
    # by now the log itself holds only what is told after the test
    told = [record.getMessage() for record in caplog.get_records("call")]
    assert not [each for each in told if "No CUDA graph could be captured" in each]


@pytest.fixture
def exact(monkeypatch):
    """Products and convolutions in whole float32."""
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which the line above leaves as it is


@pytest.fixture
def learnt(source, tmp_path):
    """A function that learns a few steps of both stages on the GPU and gives the loss of each step."""

    def learnt(performance, optimizer):
        settings = LearningSettings(
            semantic=StageSettings(steps=6, checkpoint_every=0),
            finetuning=StageSettings(
                steps=6,
                trainable="full",
                learning_rate=1e-3,
                optimizer=OPTIMIZERS[optimizer](),
                checkpoint_every=0,
            ),
            prior=PriorSettings(pictures=2, steps=2, cache=str(tmp_path / "prior")),
        )
        watch, folder = Watch(), tmp_path / f"{performance.name}-{performance.cuda_graphs}-{optimizer}"
        model = load_model(ModelSettings("tiny", source), "cuda")
        losses = penalty(reward_steps=3, time_below=1.0)
        trainer = TRAINER | {"accelerator": "gpu", "devices": 1}
        options = {"trainer": trainer, "callbacks": [watch], "performance": performance}
        learn(model, two_instances(), settings, losses, folder, **options)
        return [loss for _, _, loss in watch.losses]

    return learnt


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_learning_from_graphs_is_the_same(learnt, exact, optimizer):
    plain = learnt(FLOAT32, optimizer)
    assert len(plain) == 12 and plain[-1] != plain[0]
    assert learnt(replace(FLOAT32, cuda_graphs=True), optimizer) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_the_fastest_profile_stays_near_full_precision(learnt, optimizer):
    assert learnt(FASTEST, optimizer) == pytest.approx(learnt(FLOAT32, optimizer), rel=0.1)


@pytest.fixture
def steady_shapes(monkeypatch):
    """Shapes that do not depend on rounding, as clusters of a random U-Net's maps do; gives the maps."""
    maps = []

    def renewed(self_map, cross_map, shapes, boxes, *_):
        maps.append((self_map.clone(), cross_map.clone()))
        smaller = boxes.clone()
        smaller[..., ::2] = False
        return smaller.expand(len(self_map), -1, -1, -1), None

    monkeypatch.setattr("mifo.method.synthesis.sampler.renew_shapes", renewed)
    return maps


@pytest.mark.parametrize("layout", ["usual", "channels_last"])
@pytest.mark.parametrize("subjects", ["boxes", "plain"])
def test_synthesis_from_graphs_is_the_same(vectors, vector_unet, exact, steady_shapes, subjects, layout):
    v = {name: value.cuda() for name, value in vectors("synthesis_two_boxes").items()}
    unet, boxes = vector_unet.cuda(), boxes_of(v) if subjects == "boxes" else {}
    process = replace(PROCESS, alphas_cumprod=PROCESS.alphas_cumprod.cuda())
    # steps of the usual size would blow rounding up on this random U-Net
    guidance = replace(QUICK, guided_steps=2, step_size_start=0.1, step_size_end=0.1)
    options = {"guidance": guidance, "process": process}
    plain = run(unet, v, boxes, **options)
    renewals = len(steady_shapes)
    assert renewals == (2 if boxes else 0)
    if layout == "channels_last":
        unet.to(memory_format=torch.channels_last)
        keep_channels_last(unet)
    kept = sampler_of(unet, accelerate=partial(GraphedFunction, wanted=True), **options)
    for _ in range(2):
        replayed = run(unet, v, boxes, sampler=kept)
        torch.testing.assert_close(steady_shapes[-renewals:], steady_shapes[:renewals], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(replayed, plain, rtol=1e-3, atol=1e-3)


def test_activations_computed_twice_leave_learning_alone(learnt):
    half = replace(FLOAT32, learning_precision="bfloat16")
    once = pytest.approx(learnt(half, "adamw"), rel=0.02)
    for graphs in (False, True):
        twice = replace(half, gradient_checkpointing=True, cuda_graphs=graphs, name="twice")
        assert learnt(twice, "adamw") == once


@pytest.mark.parametrize("profile", ["default", "max_speed"])
def test_a_deterministic_run_repeats_bit_for_bit(profile, tmp_path):
    def made(name):
        command = [
            *(sys.executable, "-m", "mifo", "run", "debug=default", "device=cuda", f"performance={profile}"),
            *("performance.deterministic=true", "learning.semantic.steps=60", "learning.finetuning.steps=20"),
            *("logger=none", "callbacks=none", "metrics=none", f"hydra.run.dir={name}"),
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        folders = [tmp_path / name / part for part in ("learned", "pictures")]
        files = [file for folder in folders for file in sorted(folder.iterdir())]
        return {file.name: file.read_bytes() for file in files if file.suffix in (".safetensors", ".png")}

    first, second = made("first"), made("second")
    assert len(first) > 2 and first == second


def test_a_capture_that_fails_leaves_the_random_generator_at_work(caplog):
    def waits(x):
        return (x + torch.rand_like(x)) * x.sum().item()

    x = torch.ones(4, device="cuda")
    drawing = GraphedFunction(lambda x: x + torch.rand_like(x), wanted=True)
    drawing(x)
    assert GraphedFunction(waits, wanted=True)(x).isfinite().all()
    assert "No CUDA graph could be captured (CUDA error: operation not permitted" in caplog.text
    caplog.clear()
    assert torch.randn(3, device="cuda").isfinite().all()
    assert not torch.equal(drawing(x).clone(), drawing(x))
