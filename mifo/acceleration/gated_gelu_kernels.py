"""A gated feed-forward's product and its gradient as one Triton kernel each; called by `gated_gelu.py`.

A program takes a tile, some rows and some columns of the result. All arithmetic is in float32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, BLOCK = 8, 256  # of a tile; the feed-forwards of Stable Diffusion are multiples of 256 wide
WARPS = 4
UNSPECIALISED = ["rows", "eighths"]  # no kernel of their own for these sizes
FALL = tl.constexpr(-math.log2(math.e) / 2)
NEARNESS = tl.constexpr(0.2771)
PEAK = tl.constexpr(1 / math.sqrt(2 * math.pi))  # of the normal density


def product(projected: Tensor) -> Tensor:
    """(..., 2C) to (..., C), contiguous; C is a multiple of 8."""
    y = projected.new_empty(*projected.shape[:-1], projected.shape[-1] // 2)
    grid, sizes = _tiling(y)
    with torch.cuda.device_of(projected):
        _product[grid](projected, y, **sizes)
    return y


def gradient(dy: Tensor, projected: Tensor) -> Tensor:
    """(..., C) and what `product` was given, both contiguous, to the gradient (..., 2C)."""
    dx = torch.empty_like(projected)
    grid, sizes = _tiling(dy)
    with torch.cuda.device_of(projected):
        _gradient[grid](dy, projected, dx, **sizes)
    return dx


def _tiling(y: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Tiles of the result along rows and columns, and the arguments of both kernels."""
    channels = y.shape[-1]
    rows = y.numel() // channels
    sizes = {"rows": rows, "eighths": channels // 8, "ROWS": ROWS, "BLOCK": BLOCK, "num_warps": WARPS}
    return (triton.cdiv(rows, ROWS), triton.cdiv(channels, BLOCK)), sizes


@triton.jit(do_not_specialize=UNSPECIALISED)
def _product(projected, y, rows, eighths, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first, row, channel, channels, inside = _tile(rows, eighths, ROWS, BLOCK)
    halves = projected + first * 2 * channels + (row * 2 * channels + channel)
    hidden = tl.load(halves, inside, 0.0).to(tl.float32)
    gate = tl.load(halves + channels, inside, 0.0).to(tl.float32)
    share, _ = _normal(gate)
    tl.store(y + first * channels + (row * channels + channel), hidden * (gate * share), inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _gradient(dy, projected, dx, rows, eighths, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first, row, channel, channels, inside = _tile(rows, eighths, ROWS, BLOCK)
    at = first * 2 * channels
    within = row * 2 * channels + channel
    hidden = tl.load(projected + at + within, inside, 0.0).to(tl.float32)
    gate = tl.load(projected + at + within + channels, inside, 0.0).to(tl.float32)
    slope = tl.load(dy + first * channels + (row * channels + channel), inside, 0.0).to(tl.float32)
    share, falling = _normal(gate)
    tl.store(dx + at + within, slope * (gate * share), inside)
    tl.store(dx + at + within + channels, slope * hidden * (share + PEAK * gate * falling), inside)


@triton.jit
def _tile(rows, eighths, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A tile's first row, its rows from there and its columns, how many columns there are, which exist.

    Only the first row needs 64 bits. A width known to be a multiple of 8 allows accesses of 16 bytes.
    """
    channels = eighths * 8
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return first, row, channel, channels, (row < rows - first) & (channel < channels)


@triton.jit
def _normal(gate):
    """GELU's factor, the share of a standard normal distribution below `gate`, and exp(-gate² / 2).

    The share beyond |gate| is the exponential, which the gradient needs anyway, times a polynomial of
    t = 1 / (1 + NEARNESS |gate|), fitted so that GELU errs by at most 8e-9 before float32 rounds. With
    `tl.erf` the gradient takes 1.4 times the instructions.
    """
    falling = tl.exp2(gate * gate * FALL)
    t = 1.0 / (1.0 + NEARNESS * tl.abs(gate))
    ratio = -0.11137935 * t + 0.42663048
    ratio = ratio * t - 0.29221009
    ratio = ratio * t + 0.30704248
    ratio = ratio * t + 0.052624153
    ratio = ratio * t + 0.11729233
    beyond = ratio * t * falling
    return tl.where(gate < 0, beyond, 1.0 - beyond), falling
