"""Whether kernels of our own can run: they need a GPU, and Triton, which PyTorch brings along on Linux."""

from functools import cache
from importlib import import_module

import torch
from torch import Tensor

BLOCK = 256  # numbers of an 8-bit state of an optimiser that share a scale
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def has_kernels(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        import_module("triton")
    except ImportError:
        return False
    return True


def kernels_take(x: Tensor) -> bool:
    """Whether they can run on these activations; `torch.compile` makes kernels of its own."""
    return not torch.compiler.is_compiling() and has_kernels(x.device) and x.dtype in DTYPES and x.numel() > 0
