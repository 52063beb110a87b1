"""`mifo doctor` tells in lines what is right, doubtful and wrong, and learning makes the same checks."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import two_instances

from mifo.acceleration.settings import PerformanceSettings
from mifo.benchmark.shapes import find_shapes, random_model
from mifo.commands.doctor import doctor
from mifo.config.compose import compose, settings_of
from mifo.data.saved_pictures import as_image
from mifo.errors import MifoError
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.synthesis.settings import SynthesisSettings
from mifo.training.memory import RESERVE, learning_memory, synthesis_memory
from mifo.training.settings import LearningSettings


@pytest.fixture
def setup(source, tmp_path, monkeypatch):
    """A folder with a photo and its masks, a model, and what names both on the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("mifo.commands.setup.netrc", lambda: (_ for _ in ()).throw(OSError))
    instances, photo = two_instances(), tmp_path / "photo"
    photo.mkdir()
    as_image(instances.image).resize((64, 64)).save(photo / "img.png")
    for i, mask in enumerate(instances.masks):
        as_image(mask[None].expand(3, -1, -1)).resize((64, 64)).save(photo / f"mask{i}.png")
    shutil.copytree(source, tmp_path / "model")
    return [
        *("model=local", "model.source=model", "instances=local", "instances.folder=photo"),
        *("instances.class_names=[car,cat]", "metrics=miniature", "paths.output=out"),
        *("learning.prior.cache=cache", "learning.template='a photo of {}'"),
    ]


def told(given, capsys):
    """The lines (level, subject, text), and whether the doctor ended with an error."""
    try:
        return doctor(settings_of(compose("doctor", given))), False
    except MifoError:
        lines = capsys.readouterr().out.splitlines()
        return [(*line.split(maxsplit=2),) for line in lines], True


def white(photo, name, box, size=(64, 64)):
    """A mask that is white in a box [x0, y0, x1, y1]."""
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    Image.fromarray(mask).save(photo / name)


def test_a_good_setup_is_all_right(setup, capsys):
    lines, failed = told(setup, capsys)
    assert not failed and {level for level, *_ in lines} == {"ok"}
    found = {subject: text for _, subject, text in lines}
    assert "64×64" in found["picture"] and "<asset1>" in found["picture"]
    assert found["evaluators"] == "protocol miniature: embedded"
    assert found["layout"] == "prompts: 1, boxes: 2" and "GiB of a GPU's memory" in found["memory"]


@pytest.mark.parametrize(
    "given",
    [
        ["learning.template='a {x}'"],
        ["learning.template='a {'"],
        ["synthesis.samples=0"],
        ["learning.finetuning.trainable=lora", "learning.finetuning.lora_rank=0"],
        ["performance.synthesis_precision=bogus"],
    ],
)
def test_settings_on_which_other_checks_break_are_told(setup, capsys, given):
    lines, failed = told([*setup, *given], capsys)
    key = given[-1].partition("=")[0]
    assert failed and [text for level, *_, text in lines if level == "error" and key in text]
    assert "picture" in [subject for _, subject, _ in lines]  # what can be checked is


def no_weights(folder):
    (folder / "model" / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def half_of_the_weights(folder):
    file = folder / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def other_kind(folder):
    file = folder / "model" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 9}))


def tiny_picture(folder):
    for file in (folder / "photo").iterdir():
        Image.open(file).resize((12, 8)).save(file)


def no_mask(folder):
    for mask in (folder / "photo").glob("mask*"):
        mask.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "given", "level", "subject", "words"),
    [
        (None, ["learning.flip_probability=2"], "error", "settings", "learning.flip_probability=2"),
        (no_mask, [], "error", "picture", "holds no mask"),
        (lambda f: white(f / "photo", "mask1.png", [0, 0, 0, 0]), [], "error", "picture", "marks nothing"),
        (
            lambda f: white(f / "photo", "mask1.png", [0, 0, 9, 9], (64, 32)),
            *([], "error", "picture", "64×32"),
        ),
        (
            lambda f: white(f / "photo", "mask1.png", [0, 0, 64, 60]),
            *([], "warning", "picture", "is it white on its instance"),
        ),
        (
            lambda f: white(f / "photo", "mask1.png", [30, 30, 33, 33]),
            *([], "warning", "sizes", "<asset1> is too small to be seen where attention has 8×8"),
        ),
        (tiny_picture, [], "warning", "sizes", "has 12×8 pixels and is enlarged to 32×32"),
        (None, ["instances.class_names=[car]"], "error", "picture", "instances.class_names names 1"),
        (None, ["model=miniature", "model.source=embedded"], "warning", "picture", "draws a cartoon"),
        (None, ["instances.initializers=['',cat]"], "error", "picture", "empty word"),
        (None, ["layout.boxes={asset0: [0, 0, 0.02, 1]}"], "error", "layout", "too small"),
        (None, ["layout.endings=[" + "very " * 40 + "]"], "error", "layout", "shorten"),
        (None, ["learning.template='a " + "red " * 40 + "{}'"], "error", "words", "shorten"),
        (no_weights, [], "error", "weights", "diffusion_pytorch_model.safetensors is missing"),
        (half_of_the_weights, [], "error", "weights", "copy or download it again"),
        (other_kind, [], "error", "sizes", "in_channels"),
        (None, ["metrics.image_text.name=ViT-X"], "error", "evaluators", "ViT-X is no model of open_clip"),
        (None, ["metrics.image.source=someone/vit"], "warning", "evaluators", "are not here yet"),
        (None, ["logger=wandb"], "warning", "loggers", "wandb login"),
    ],
)
def test_a_broken_setup_is_told_by_its_line(setup, tmp_path, capsys, broken, given, level, subject, words):
    if broken:
        broken(tmp_path)
    lines, failed = told([*setup, *given], capsys)
    assert failed == (level == "error")
    assert [line for line in lines if line[:2] == (level, subject) and words in line[2]], lines
    assert sum(found == "error" for found, *_ in lines) == failed  # each fault is told once


def test_a_full_disk_and_a_small_gpu_are_told(setup, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 1))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (2**29, 2**30))
    lines, failed = told(setup, capsys)
    levels = {subject: level for level, subject, _ in lines if level != "ok"}
    assert failed and levels == {"disk": "error", "memory": "warning"}


def test_learning_makes_the_same_checks(mifo, setup, tmp_path, capsys):
    white(tmp_path / "photo", "mask1.png", [30, 30, 33, 33])
    given = [each for each in setup if not each.startswith(("metrics", "paths"))]
    assert mifo("learn", *given, "debug=default", "logger=none") == 0
    assert "<asset1> is too small to be seen" in capsys.readouterr().out
    assert mifo("learn", *given, "learning.template='a " + "red " * 40 + "{}'") == 2
    assert "shorten" in capsys.readouterr().err


FULL = PerformanceSettings(learning_precision="bfloat16", synthesis_precision="bfloat16")
SPARE = replace(FULL, gradient_checkpointing=True)
ROUNDED = replace(FULL, autocast=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shapes", "dtype", "performance", "trainable", "measured"),
    [  # GiB of stage 1, stage 2 and a picture on an H100: the records and house.md in experiments/benchmark
        ("sd21", "float32", FULL, "full", (8.06, 16.28, 3.76)),
        ("sd21", "float32", ROUNDED, "full", (7.85, 11.72, None)),
        ("sd21", "float32", SPARE, "full", (None, 12.16, None)),
        ("sd21", "bfloat16", SPARE, "lora", (4.83, 4.86, 3.13)),
        ("sdxl", "float32", ROUNDED, "lora", (23.7, 33.6, None)),
        ("sd35", "float32", ROUNDED, "lora", (27.4, None, None)),
        ("flux2_klein", "bfloat16", SPARE, "lora", (21.11, 23.89, None)),
        ("z_image", "bfloat16", SPARE, "lora", (25.45, 27.23, None)),
        # taken before guidance computed activations twice
        ("flux2_klein", "bfloat16", FULL, "lora", (None, None, 27.08)),
        ("z_image", "bfloat16", FULL, "lora", (None, None, 42.18)),
    ],
)
def test_memory_is_what_was_measured(shapes, dtype, performance, trainable, measured):
    def model():
        return random_model(shapes, torch.device("meta"), dtype)

    def gib(needed):
        return (needed.total - RESERVE) / 2**30

    for stage, expected in zip(("semantic", "finetuning"), measured[:2], strict=True):
        learning, learner = LearningSettings(), model()
        learner.add_words(["<asset0>", "<asset1>", "<asset2>"])
        other = {"semantic": learning.finetuning, "finetuning": learning.semantic}[stage]
        other.steps = 0
        learning.finetuning.trainable = trainable
        if stage == "finetuning" and trainable == "lora":
            learner.add_lora(16)
        if expected:
            assert gib(learning_memory(learner, learning, performance)) == pytest.approx(expected, rel=0.15)
    if measured[2]:
        steps, scale = find_shapes(shapes).sampling or (50, 7.5)
        settings = SynthesisSettings(steps=steps, guidance_scale=scale, samples=1)
        needed = synthesis_memory(model(), settings, GuidanceSettings(), performance)
        assert gib(needed) == pytest.approx(measured[2], rel=0.15)
