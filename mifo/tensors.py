"""Tensors in files: written, read and refused when they are not the expected ones."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mifo.errors import MifoError
from mifo.files import checksum, reason, regular_file

FLOATS = ("F16", "BF16", "F32")  # as safetensors names them

Form = Mapping[str, Sequence[int]]  # shapes by name


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write finite tensors as safetensors, from any device; returns the SHA-256 of the file in hexadecimals.

    Raises:
        MifoError: a number is NaN or infinite.
        OSError: the file cannot be written.
    """
    if bad := not_finite(tensors):
        raise MifoError(f"{path.name} is not saved: {bad} is not finite in {tensors[bad].dtype}")
    try:
        save_file({name: each.cpu().contiguous() for name, each in tensors.items()}, path)
    except SafetensorError as error:  # which hides the error of the system
        raise OSError(str(error)) from error
    return checksum(path)


def read_tensors(path: Path, expected: Form | None, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU in the precision of the file.

    Args:
        expected: the shape of every tensor of the file; None: not known.
        sha256: checksum of the file; None: not known.

    Raises:
        MifoError: the file is missing or damaged, a tensor is missing, unknown, of another shape, of no
            floating-point type or not finite.
    """
    if sha256 is not None and checksum(path) != sha256:
        raise MifoError(f"{path} is damaged: its checksum is another")
    with regular_file(path):
        pass  # safetensors itself would wait for a pipe
    try:
        with safe_open(path, "pt") as file:
            heads = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no mapping
            shapes = {name: head.get_shape() for name, head in heads.items()}
            if expected is not None and (other := difference(shapes, expected)):
                raise MifoError(f"{path} is damaged: {other}")
            for name, head in heads.items():
                if (kind := head.get_dtype()) not in FLOATS:
                    raise MifoError(
                        f"{path} is damaged: {name} is of the type {kind}, not {', '.join(FLOATS)}"
                    )
            tensors = {name: file.get_tensor(name) for name in heads}
    except (OSError, SafetensorError) as error:
        raise MifoError(f"{path} is damaged: {reason(error)}") from error
    if bad := not_finite(tensors):
        raise MifoError(f"{path} is damaged: {bad} is not finite")
    return tensors


def difference(found: Form, expected: Form) -> str | None:
    """The first difference between the found and the expected shapes, in words; None if they agree."""
    for name, shape in expected.items():
        if name not in found:
            return f"it lacks {name}"
        if list(found[name]) != list(shape):
            return f"{name} has the shape {list(found[name])}, not {list(shape)}"
    return next((f"it holds the unknown {name}" for name in found if name not in expected), None)


def not_finite(tree: Any) -> str | None:
    """The name of a tensor with NaN or infinity in nested mappings and lists; None if all are finite.

    The call waits once for each device.
    """
    found = [(name, each) for name, each in _tensors(tree) if each.is_floating_point() and each.numel()]
    kinds = {(each.device, each.dtype) for _, each in found}
    for kind in kinds:
        same = [(name, each.detach()) for name, each in found if (each.device, each.dtype) == kind]
        # the largest magnitude is NaN where one number is; one kernel for many tensors, five times as slow on
        # a processor as both extremes
        if kind[0].type == "cpu":
            largest = torch.stack([torch.stack(each.aminmax()) for _, each in same]).abs().amax(1)
        else:
            largest = torch.stack(torch._foreach_norm([each for _, each in same], float("inf")))
        for (name, _), finite in zip(same, largest.isfinite().tolist(), strict=True):
            if not finite:
                return name
    return None


def _tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor, with the keys that lead to it as its name."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping | list | tuple):
        for key, each in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _tensors(each, f"{name}.{key}" if name else str(key))
