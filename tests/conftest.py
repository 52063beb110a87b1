"""Fixtures shared by the tests: the reference vectors and the small U-Net they were computed on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

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
