"""Whether kernels of our own can run: they need a GPU, and Triton, which PyTorch brings along on Linux."""

from functools import cache
from importlib import import_module

import torch


@cache
def has_kernels(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        import_module("triton")
    except ImportError:
        return False
    return True
