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

from mifo.performance.adamw_8bit import BLOCK

ROWS, WARPS = 1, 1  # blocks and warps of a program: 10.6 ms for 1.2e9 numbers on an H100, others 10.8 to 51
TEN = tl.constexpr(math.log2(10))


class Tables:
    """Where the numbers of each parameter lie: addresses and sizes, and the program that takes which part.

    Args:
        memory: for each parameter its numbers, gradient, copy, both moments and both scales, on one GPU.
        pointers: the addresses in that order, flat.
    """

    def __init__(self, memory: Sequence[Sequence[Tensor]], pointers: tuple[int, ...]) -> None:
        device = memory[0][0].device
        sizes = torch.tensor([row[0].numel() for row in memory])
        programs = (sizes + BLOCK * ROWS - 1) // (BLOCK * ROWS)
        owners = torch.arange(len(memory)).repeat_interleave(programs)
        firsts = torch.arange(len(owners)) - (programs.cumsum(0) - programs)[owners]
        self.pointers = pointers
        self.addresses = torch.tensor(pointers).view(len(memory), -1).to(device)
        self.sizes = sizes.to(device)
        self.owners, self.firsts = owners.int().to(device), firsts.int().to(device)
        # what a GPU allocates lies so; parts of other tensors need not
        self.aligned = all(pointer % 16 == 0 for pointer in pointers)


def launch(
    tables: Tables,
    kind: tuple[torch.dtype, bool, bool],
    group: dict[str, Any],
    step: int,
    divisor: Tensor | None,
) -> None:
    """Step the parameters of `tables`.

    Args:
        kind: dtype of the gradients; whether moments are 8-bit codes; whether there are rounded copies, in
            the gradients' precision.
        group: `lr`, `betas`, `eps` and `weight_decay`.
        step: the number of this step, from 1.
        divisor: of the gradients, a scalar on the GPU, or None.
    """
    dtype, quantised, copied = kind
    beta1, beta2 = group["betas"]
    _adamw[(len(tables.owners),)](
        tables.addresses,
        tables.sizes,
        tables.owners,
        tables.firsts,
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
        ROWS=ROWS,
        num_warps=WARPS,
    )


@triton.jit
def _adamw(
    addresses,
    sizes,
    owners,
    firsts,
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
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    row = tl.load(firsts + program).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < tl.load(sizes + owner)
    there = row * BLOCK < tl.load(sizes + owner)
    parameters = _pointer(addresses, owner, 0, tl.float32, ALIGNED)
    gradients = _pointer(addresses, owner, 1, GRADIENT, ALIGNED)
    MOMENT: tl.constexpr = tl.uint8 if QUANTISED else tl.float32
    means = _pointer(addresses, owner, 3, MOMENT, ALIGNED)
    squares = _pointer(addresses, owner, 4, MOMENT, ALIGNED)
    gradient = tl.load(gradients + at, inside, 0.0).to(tl.float32)
    if DIVIDED:
        gradient = gradient * (1 / tl.load(divisor))
    mean = tl.load(means + at, inside, 0)
    square = tl.load(squares + at, inside, 0)
    if QUANTISED:
        mean_scales = _pointer(addresses, owner, 5, tl.float32, ALIGNED)
        square_scales = _pointer(addresses, owner, 6, tl.float32, ALIGNED)
        mean = _decode(mean.to(tl.int32), True) * tl.load(mean_scales + row, there, 0.0)[:, None]
        square = _decode(square.to(tl.int32), False) * tl.load(square_scales + row, there, 0.0)[:, None]
    mean = mean + (1 - beta1) * (gradient - mean)
    square = beta2 * square + (1 - beta2) * gradient * gradient
    if QUANTISED:
        scale = tl.maximum(tl.max(tl.abs(mean), 1), 1.1754943508222875e-38)
        tl.store(mean_scales + row, scale, there)
        tl.store(means + at, _encode(mean * (1 / scale)[:, None], True).to(tl.uint8), inside)
        scale = tl.maximum(tl.max(square, 1), 1.1754943508222875e-38)
        tl.store(square_scales + row, scale, there)
        tl.store(squares + at, _encode(square * (1 / scale)[:, None], False).to(tl.uint8), inside)
    else:
        tl.store(means + at, mean, inside)
        tl.store(squares + at, square, inside)
    weight = tl.load(parameters + at, inside, 0.0) * shrinking
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
def _decode(code, SIGNED: tl.constexpr):
    """The level of a code: decade d of seven has 2^d levels of each sign, or 2^(d + 1) without signs.

    The k-th level of decade d is number 2^m + k, m = d or d + 1, of all levels but 0, so that exponent and
    mantissa of that number are m and 1 + k/2^m.
    """
    MORE: tl.constexpr = 0 if SIGNED else 1
    MIDDLE: tl.constexpr = 127 if SIGNED else 0
    LAST: tl.constexpr = 128 if SIGNED else 255
    signed = _small_float(code) - MIDDLE
    place = tl.abs(signed)
    number = (place + ((1 << MORE) - 1)).to(tl.int32, bitcast=True)
    exponent = (number >> 23) - 127
    mantissa = (number & 0x7FFFFF | 0x3F800000).to(tl.float32, bitcast=True)
    decade = (exponent - MORE - 6).to(tl.float32)
    level = (0.9 * mantissa - 0.8 + 0.45 * _power(-exponent)) * tl.exp2(decade * TEN)
    level = tl.where(place == 0, 0.0, tl.where(place == LAST, 1.0, level))
    return tl.where(signed < 0, -level, level)


@triton.jit
def _encode(value, SIGNED: tl.constexpr):
    """The code of the level nearest to a number in [-1, 1]."""
    MORE: tl.constexpr = 0 if SIGNED else 1
    TOP: tl.constexpr = 1 - 0.225 / (1 << (6 + MORE))
    size = tl.abs(value)
    # a number at the border of two decades may be counted to either: what follows finds the same level
    decade = tl.minimum(tl.maximum(_floor(tl.log2(size) / TEN) + 7, 0.0), 6.0)
    exponent = _small_int(decade) + MORE
    levels, fraction = _power(exponent), _power(-exponent)
    # in units of the decade's upper end its levels are the middles of equal parts of [0.1, 1]
    scaled = size * tl.exp2((6 - decade) * TEN)
    part = _floor((scaled - 0.1) * (1 / 0.9) * levels)
    place = levels + (1 - (1 << MORE)) + tl.minimum(tl.maximum(part, 0.0), levels - 1)
    # the last level below this decade reaches a bit beyond its lower end, 0 half way to the first level
    reach = tl.where(decade == 0, 0.05 + 0.225 * fraction, 0.1 + 0.18 * fraction)
    place = tl.where(scaled < reach, place - 1, place)
    # and 1 is a level of its own
    place = tl.where(size > TOP, place + 1, place)
    if SIGNED:
        place = tl.where(value < 0, 127 - tl.minimum(place, 127.0), 127 + place)
    return _small_int(place)


# Conversions between integers and floats run at a quarter of the rate of sums. Added to 2^23, an integer
# below it stands in the last bits of a float.


@triton.jit
def _small_float(integer):
    """A small integer, not negative, as a float."""
    return (integer | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _small_int(number):
    """A small whole float, not negative, as an integer."""
    return (number + 8388608.0).to(tl.int32, bitcast=True) & 0x7FFFFF


@triton.jit
def _floor(number):
    """The largest whole number that is not above a number, of magnitudes below 2^22."""
    nearest = (number + 12582912.0) - 12582912.0
    return tl.where(nearest > number, nearest - 1, nearest)


@triton.jit
def _power(exponent):
    """2 to the power of an integer."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)
