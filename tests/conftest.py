"""Fixtures shared by the tests: the command line, the reference vectors and the U-Net they came from."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from recorded import Recordings
from safetensors.torch import load_file
from tiny import MeanColour, tiny_pipeline

from mifo import cli
from mifo.backbones.latent import LatentModel
from mifo.backbones.loading import load_model
from mifo.backbones.settings import ModelSettings
from mifo.metrics.evaluation import PictureEvaluator

VECTORS = Path(__file__).parent / "vectors"

Vectors = Callable[[str], dict[str, torch.Tensor]]


@pytest.fixture
def vector_unet() -> UNet2DConditionModel:
    """The four-level U-Net with random weights on which the vectors were computed; its gradients are off."""
    return UNet2DConditionModel.from_pretrained(VECTORS / "unet").eval().requires_grad_(False)


@pytest.fixture(scope="session")
def vectors() -> Vectors:
    """`vectors("penalty")` gives the tensors of `tests/vectors/penalty.safetensors` by name."""
    return lambda name: load_file(VECTORS / f"{name}.safetensors")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """A pipeline folder of tiny models with random weights."""
    return str(tiny_pipeline(tmp_path_factory.mktemp("pipeline")))


@pytest.fixture
def model(source) -> LatentModel:
    """The tiny model of `source`, which a module may have of its own."""
    return load_model(ModelSettings("tiny", source))


@pytest.fixture(scope="module")
def shared(source) -> LatentModel:
    """The same for tests that leave it as it is."""
    return load_model(ModelSettings("tiny", source))


@pytest.fixture
def recordings(monkeypatch) -> Recordings:
    """CUDA graphs can be had without a GPU: their operations are recorded and replayed."""
    recordings = Recordings()
    monkeypatch.setattr("mifo.acceleration.graphs.capture", recordings.capture)
    monkeypatch.setattr("mifo.training.fit.available", lambda settings, *_: settings)
    return recordings


@pytest.fixture
def mifo(tmp_path, monkeypatch):
    """Run a command in an empty folder; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(
        PictureEvaluator,
        "from_settings",
        lambda settings, device: PictureEvaluator(MeanColour(), MeanColour()),
    )

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mifo", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code
        return 0

    return call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A folder with a photo of two things and their masks."""
    folder = tmp_path_factory.mktemp("photo")
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "img.png")
    for i in range(2):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (32 * i, 8, 32 * i + 30, 60))
        mask.save(folder / f"mask{i}.png")
    return folder
