"""Whether kernels of our own can run.

They need a GPU, and Triton, which PyTorch brings along on Linux.

A benchmark lets PyTorch or its compiler compute in a kernel's place, to measure what the kernel gains.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from mifo.acceleration.compiling import compiled

BLOCK = 256  # numbers of an 8-bit state of an optimiser that share a scale
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_others: dict[str, str] = {}  # who computes in place of some accelerations


@cache
def has_kernels(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        import_module("triton")
    except ImportError:
        return False
    return True


def kernels_take(name: str, x: Tensor) -> bool:
    """Whether the kernels of a name can run on these activations; `torch.compile` makes its own."""
    return (
        not torch.compiler.is_compiling()
        and own(name)
        and has_kernels(x.device)
        and x.dtype in DTYPES
        and x.numel() > 0
    )


@contextmanager
def computed_by(others: Mapping[str, str]) -> Iterator[None]:
    """Within the `with` block, others compute in place of some accelerations; captured graphs stay.

    Args:
        others: by name of an acceleration, which is its file's: `torch`, or `compiler` where it has `plain`.
    """
    before = dict(_others)
    _others.update(others)
    try:
        yield
    finally:
        _others.clear()
        _others.update(before)


def own(name: str) -> bool:
    """Whether an acceleration of ours shall run, since nobody computes in its place."""
    return name not in _others


def plain(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What computes where the kernels of a name do not: PyTorch's function as it is, or compiled."""
    return compiled(function) if _others.get(name) == "compiler" else function
