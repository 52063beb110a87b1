"""A step of AdamW over all parameters as one Triton kernel; the states are those of `adamw_8bit.py`.

A number costs one read of its gradient, one read and write of weight and moments, and one write of the
weight's rounded copy; nothing else passes through memory.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mifo.acceleration.kernels import BLOCK

WARPS = 1  # of a program, which takes a block


class Tables:
    """Where the numbers of each parameter lie: addresses and sizes, and the program that takes which part.

    Args:
        memory: for each parameter its numbers, gradient, copy, both moments and both scales, on one GPU.
        pointers: the addresses in that order, flat.
    """

    def __init__(self, memory: Sequence[Sequence[Tensor]], pointers: tuple[int, ...]) -> None:
        device = memory[0][0].device
        # millions of programs, which a processor would take a tenth of a second to list
        sizes = torch.tensor([row[0].numel() for row in memory], device=device)
        programs = (sizes + BLOCK - 1) // BLOCK
        owners = torch.arange(len(memory), device=device).repeat_interleave(programs)
        firsts = torch.arange(len(owners), device=device) - (programs.cumsum(0) - programs)[owners]
        self.pointers = pointers
        self.addresses = torch.tensor(pointers).view(len(memory), -1).to(device)
        self.sizes, self.owners, self.firsts = sizes, owners.int(), firsts.int()
        # what a GPU allocates lies so; parts of other tensors need not
        self.aligned = all(pointer % 16 == 0 for pointer in pointers)


def launch(
    tables: Tables,
    kind: tuple[torch.dtype, bool, bool],
    group: dict[str, Any],
    step: int,
    divisor: Tensor | None,
    levels: tuple[Tensor, Tensor],
) -> None:
    """Step the parameters of `tables`.

    Args:
        kind: dtype of the gradients; whether moments are 8-bit codes; whether there are rounded copies, in
            the gradients' precision.
        group: `lr`, `betas`, `eps` and `weight_decay`.
        step: the number of this step, from 1.
        divisor: of the gradients, a scalar on the GPU, or None.
        levels: (256,) float32, what a code of the first and of the second moment means.
    """
    dtype, quantised, copied = kind
    beta1, beta2 = group["betas"]
    _adamw[(len(tables.owners),)](
        tables.addresses,
        tables.sizes,
        tables.owners,
        tables.firsts,
        *levels,
        tables.sizes if divisor is None else divisor,
        group["lr"],
        beta1,
        beta2,
        group["eps"],
        1 - group["lr"] * group["weight_decay"],
        1 / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step),
        DIVIDED=divisor is not None,
        GRADIENT={torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype],
        QUANTISED=quantised,
        COPIED=copied,
        ALIGNED=tables.aligned,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


@triton.jit
def _adamw(
    addresses,
    sizes,
    owners,
    firsts,
    mean_levels,
    square_levels,
    divisor,
    rate,
    beta1,
    beta2,
    eps,
    shrinking,
    correction1,
    correction2,
    DIVIDED: tl.constexpr,
    GRADIENT: tl.constexpr,
    QUANTISED: tl.constexpr,
    COPIED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    block = tl.load(firsts + program).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    # blocks that are quantised are whole; a comparison for each number would split what is read at once
    inside = None if QUANTISED else at < tl.load(sizes + owner)
    parameters = _pointer(addresses, owner, 0, tl.float32, ALIGNED)
    gradients = _pointer(addresses, owner, 1, GRADIENT, ALIGNED)
    MOMENT: tl.constexpr = tl.uint8 if QUANTISED else tl.float32
    means = _pointer(addresses, owner, 3, MOMENT, ALIGNED)
    squares = _pointer(addresses, owner, 4, MOMENT, ALIGNED)
    gradient = tl.load(gradients + at, inside).to(tl.float32)
    if DIVIDED:
        gradient = gradient * (1 / tl.load(divisor))
    mean = tl.load(means + at, inside)
    square = tl.load(squares + at, inside)
    if QUANTISED:
        mean_scales = _pointer(addresses, owner, 5, tl.float32, ALIGNED)
        square_scales = _pointer(addresses, owner, 6, tl.float32, ALIGNED)
        mean = tl.load(mean_levels + mean.to(tl.int32)) * tl.load(mean_scales + block)
        square = tl.load(square_levels + square.to(tl.int32)) * tl.load(square_scales + block)
    mean = mean + (1 - beta1) * (gradient - mean)
    square = beta2 * square + (1 - beta2) * gradient * gradient
    if QUANTISED:
        scale = tl.maximum(tl.max(tl.abs(mean), 0), 1.1754943508222875e-38)
        tl.store(mean_scales + block, scale)
        tl.store(means + at, _encode(mean * (1 / scale), True))
        scale = tl.maximum(tl.max(square, 0), 1.1754943508222875e-38)
        tl.store(square_scales + block, scale)
        tl.store(squares + at, _encode(square * (1 / scale), False))
    else:
        tl.store(means + at, mean, inside)
        tl.store(squares + at, square, inside)
    weight = tl.load(parameters + at, inside) * shrinking
    weight -= rate * correction1 * mean / (tl.sqrt(square) * correction2 + eps)
    tl.store(parameters + at, weight, inside)
    if COPIED:
        copies = _pointer(addresses, owner, 2, GRADIENT, ALIGNED)
        tl.store(copies + at, weight.to(GRADIENT), inside)


@triton.jit
def _pointer(addresses, owner, column, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(addresses + owner * 7 + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _encode(value, SIGNED: tl.constexpr):
    """The code of the level nearest to a number in [-1, 1].

    Decade d of seven has 2^m levels, m = d or, without signs, d + 1: the middles of equal parts of [0.1, 1]
    in units of its upper end. The k-th of them is number 2^m + k of all levels but 0, which is linear in the
    value within a decade.
    """
    MORE: tl.constexpr = 0 if SIGNED else 1
    size = tl.abs(value)
    high = size > _border(4, MORE)
    middle = size > tl.where(high, _border(6, MORE), _border(2, MORE))
    above = tl.where(middle, 2.0, _border(5, MORE))
    below = tl.where(middle, _border(3, MORE), _border(1, MORE))
    low = size > tl.where(high, above, below)
    levels = tl.where(high, 16.0 * (1 << MORE), 1.0 * (1 << MORE))
    levels = tl.where(middle, 4 * levels, levels)
    levels = tl.where(low, 2 * levels, levels)
    SLOPE: tl.constexpr = 1e6 / 0.9 * (1 << MORE)
    # 10^(6 - d) 2^m / 0.9
    slope = tl.where(high, 1.6e-3 * SLOPE, SLOPE)
    slope = tl.where(middle, 4e-2 * slope, slope)
    slope = tl.where(low, 0.2 * slope, slope)
    # halves go to the nearest whole number below, where it is made an integer
    place = size * slope + (levels * (8 / 9) - 0.5)
    place = tl.minimum(place, 2 * levels - 1)
    place = tl.where(size > 1e-6 * (0.05 + 0.225 / (1 << MORE)), place, 1.0 * ((1 << MORE) - 1))
    # 1 is a level of its own
    place = tl.where(size > 1 - 0.225 / (1 << (6 + MORE)), 128.0 * (1 << MORE), place)
    if SIGNED:
        negative = value.to(tl.int32, bitcast=True) & -2147483648
        place = (place.to(tl.int32, bitcast=True) | negative).to(tl.float32, bitcast=True)
        place = tl.maximum(place, -127.0)
    # added to 2^23, a whole number stands in the last bits of a float
    ZERO: tl.constexpr = 8388608.0 + 127 if SIGNED else 8388608.0 - 1
    return (place + ZERO).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def _border(decade: tl.constexpr, more: tl.constexpr):
    """Between a decade's first level and the last one below it."""
    return 10.0 ** (decade - 6) * (0.1 + 0.18 / 2 ** (decade + more))
