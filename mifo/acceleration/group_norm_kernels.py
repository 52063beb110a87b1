"""GroupNorm with SiLU and its gradients as Triton kernels on channels-last memory; called by `group_norm.py`.

A program takes a tile: some pixels, and as many whole groups of channels as fit into `WIDTH` of them. Each
direction takes two launches. The first writes what its tile adds to the statistics of a group; the second
adds these up in a fixed order, which saves a launch of its own unless they are many, and applies them. All
arithmetic is in float32, and no result depends on the order in which programs run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 128  # most channels of a tile, unless one group alone has more
PIXELS, FEWER_PIXELS = 64, 16  # of a tile; the fewer where the more would leave too few programs
MANY = 512  # tiles along pixels from which on no tile of the result adds up the statistics of all by itself
ENOUGH = 128  # programs: about one for each multiprocessor of a large GPU
FOLD = tl.constexpr(64)  # tiles whose statistics are added up at once
UNSPECIALISED = ["pixels", "groups", "per_group", "chunks"]  # no kernel of their own for these sizes


class Tiling:
    """How an activation is cut into tiles.

    Attributes:
        grid: tiles along pixels and along channels, and images.
        partial_shape: (images, tiles along pixels, groups).
        arguments: of every kernel here.
    """

    def __init__(self, x: Tensor, groups: int) -> None:
        images, channels, height, width = x.shape
        pixels, per_group = height * width, channels // groups
        taken = min(max(WIDTH // per_group, 1), groups)
        across = triton.cdiv(groups, taken)
        many = triton.cdiv(pixels, PIXELS) * across * images >= ENOUGH
        rows = PIXELS if many else FEWER_PIXELS
        chunks = triton.cdiv(pixels, rows)
        block = triton.next_power_of_2(taken * per_group)
        self.grid = (chunks, across, images)
        self.partial_shape = (images, chunks, groups)
        self.arguments = {
            "pixels": pixels,
            "channels": channels,
            "groups": groups,
            "per_group": per_group,
            "chunks": chunks,
            "TAKEN": taken * per_group,
            "BLOCK": block,
            # sizes in common keep the number of kernels to compile small
            "GROUPS": max(triton.next_power_of_2(taken), 16),
            "ROWS": rows,
            "num_warps": min(max(rows * block // 1024, 4), 16),
        }


def normalised(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised, scaled and shifted activations, after SiLU if asked.

    Args:
        x: (N, C, H, W), channels-last, float32, bfloat16 or float16.
        weight, bias: (C,).

    Returns:
        y as x, and the mean and the reciprocal standard deviation of each group, (N, groups), float32.
    """
    tiling = Tiling(x, groups)
    means, variances = _float32(x, 2, *tiling.partial_shape)
    combined = tiling.partial_shape[1] > MANY
    y = torch.empty_like(x, memory_format=torch.channels_last)
    with torch.cuda.device_of(x):
        _tile_moments[tiling.grid](x, means, variances, **tiling.arguments)
        if combined:
            mean, rstd = _combine(means, variances, eps, **tiling.arguments)
        else:
            mean, rstd = _float32(x, 2, len(x), groups)
        _normalise[tiling.grid](
            *(x, weight, bias, means, variances, mean, rstd, y, eps),
            SILU=silu,
            COMBINED=combined,
            **tiling.arguments,
        )
    return y, mean, rstd


def _combine(
    means: Tensor, variances: Tensor, eps: float, *, pixels: int, chunks: int, ROWS: int, **_: int
) -> tuple[Tensor, Tensor]:
    """Means and reciprocal standard deviations (images, groups) by the law of total variance."""
    shares = torch.full((1, chunks, 1), ROWS / pixels, device=means.device)
    shares[:, -1] = 1 - (chunks - 1) * ROWS / pixels  # the last tile may be smaller
    mean = (shares * means).sum(1)
    variance = (shares * (variances + (means - mean[:, None]).square())).sum(1)
    return mean, (variance + eps).rsqrt()


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    of_input: bool,
    of_affine: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, from what `normalised` was given and gave.

    Args:
        dy: as x, channels-last.
        of_input: whether that of x is wanted.
        of_affine: whether those of weight and bias are.

    Returns:
        (N, C, H, W) as x, channels-last, (C,) and (C,) in float32; None for those not wanted.
    """
    tiling = Tiling(x, mean.shape[1])
    images, chunks, _ = tiling.partial_shape
    slopes, products = _float32(x, 2, *tiling.partial_shape)
    # without affine gradients the kernel stores nothing there
    per_channel = _float32(x, 2, images, chunks, x.shape[1]) if of_affine else slopes
    known = (dy, x, weight, bias, mean, rstd)
    dx = torch.empty_like(x, memory_format=torch.channels_last) if of_input else None
    with torch.cuda.device_of(x):
        _tile_gradients[tiling.grid](
            *known, slopes, products, per_channel, SILU=silu, AFFINE=of_affine, **tiling.arguments
        )
        if dx is not None:
            _input_gradient[tiling.grid](*known, slopes, products, dx, SILU=silu, **tiling.arguments)
    of_bias, of_weight = per_channel.sum((1, 2)) if of_affine else (None, None)
    return dx, of_weight, of_bias


def _float32(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _tile_moments(
    x,
    means,
    variances,
    pixels,
    channels,
    groups,
    per_group,
    chunks,
    TAKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each group's mean and variance in a tile; deviations from its own mean do not cancel."""
    at, inside, _, _ = _numbers(pixels, channels, TAKEN, BLOCK, ROWS)
    group, known, member = _groups(groups, per_group, TAKEN, BLOCK, GROUPS)
    values = tl.load(x + at, inside, 0.0).to(tl.float32)
    count = _rows_inside(tl.program_id(0), pixels, ROWS) * per_group
    mean = _by_group(tl.sum(values, 0), member) / count
    deviation = tl.where(inside, values - _by_channel(mean, member)[None, :], 0.0)
    variance = _by_group(tl.sum(deviation * deviation, 0), member) / count
    to = (tl.program_id(2) * chunks + tl.program_id(0)) * groups + group
    tl.store(means + to, mean, known)
    tl.store(variances + to, variance, known)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _normalise(
    x,
    weight,
    bias,
    means,
    variances,
    mean,
    rstd,
    y,
    eps,
    pixels,
    channels,
    groups,
    per_group,
    chunks,
    TAKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    COMBINED: tl.constexpr,
):
    at, inside, channel, owned = _numbers(pixels, channels, TAKEN, BLOCK, ROWS)
    group, known, member = _groups(groups, per_group, TAKEN, BLOCK, GROUPS)
    values = tl.load(x + at, inside, 0.0).to(tl.float32)
    scale = tl.load(weight + channel, owned, 0.0).to(tl.float32)
    shift = tl.load(bias + channel, owned, 0.0).to(tl.float32)
    of_group = tl.program_id(2) * groups + group
    if COMBINED:
        average = tl.load(mean + of_group, known, 0.0)
        inverse = tl.load(rstd + of_group, known, 0.0)
    else:
        average, variance = _moments(means, variances, group, known, pixels, groups, chunks, GROUPS, ROWS)
        inverse = tl.rsqrt(variance + eps)
        if tl.program_id(0) == 0:
            tl.store(mean + of_group, average, known)
            tl.store(rstd + of_group, inverse, known)
    scale *= _by_channel(inverse, member)
    result = (values - _by_channel(average, member)[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        result *= tl.sigmoid(result)
    tl.store(y + at, result, inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _tile_gradients(
    dy,
    x,
    weight,
    bias,
    mean,
    rstd,
    slopes,
    products,
    per_channel,
    pixels,
    channels,
    groups,
    per_group,
    chunks,
    TAKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    AFFINE: tl.constexpr,
):
    """Sums over a tile of the norm's output gradient, alone and times the normalised input.

    By group they are weighted by `weight`; by channel they are not, and lie one after the other.
    """
    at, inside, channel, owned = _numbers(pixels, channels, TAKEN, BLOCK, ROWS)
    group, known, member = _groups(groups, per_group, TAKEN, BLOCK, GROUPS)
    scale = tl.load(weight + channel, owned, 0.0).to(tl.float32)
    shift = tl.load(bias + channel, owned, 0.0).to(tl.float32)
    average = _statistic(mean, groups, group, known, member)
    inverse = _statistic(rstd, groups, group, known, member)
    normed, slope = _recomputed(x, dy, at, inside, average, inverse, scale, shift, SILU)
    summed, multiplied = tl.sum(slope, 0), tl.sum(slope * normed, 0)
    tile = tl.program_id(2) * chunks + tl.program_id(0)
    tl.store(slopes + tile * groups + group, _by_group(summed * scale, member), known)
    tl.store(products + tile * groups + group, _by_group(multiplied * scale, member), known)
    if AFFINE:
        second = per_channel + tl.num_programs(2) * chunks * channels
        tl.store(per_channel + tile * channels + channel, summed, owned)
        tl.store(second + tile * channels + channel, multiplied, owned)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _input_gradient(
    dy,
    x,
    weight,
    bias,
    mean,
    rstd,
    slopes,
    products,
    dx,
    pixels,
    channels,
    groups,
    per_group,
    chunks,
    TAKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    at, inside, channel, owned = _numbers(pixels, channels, TAKEN, BLOCK, ROWS)
    group, known, member = _groups(groups, per_group, TAKEN, BLOCK, GROUPS)
    scale = tl.load(weight + channel, owned, 0.0).to(tl.float32)
    shift = tl.load(bias + channel, owned, 0.0).to(tl.float32)
    average = _statistic(mean, groups, group, known, member)
    inverse = _statistic(rstd, groups, group, known, member)
    normed, slope = _recomputed(x, dy, at, inside, average, inverse, scale, shift, SILU)
    count = pixels * per_group
    constant = _by_channel(_total(slopes, group, known, groups, chunks, GROUPS) / count, member)
    linear = _by_channel(_total(products, group, known, groups, chunks, GROUPS) / count, member)
    result = slope * scale[None, :] - constant[None, :] - normed * linear[None, :]
    tl.store(dx + at, result * inverse[None, :], inside)


@triton.jit
def _numbers(pixels, channels, TAKEN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Offsets of a tile's numbers and which exist, [ROWS, BLOCK]; its channels and which exist, [BLOCK]."""
    column = tl.arange(0, BLOCK)
    channel = tl.program_id(1) * TAKEN + column
    owned = (column < TAKEN) & (channel < channels)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(2).to(tl.int64) * pixels * channels
    at = first + row[:, None] * channels + channel[None, :]
    return at, (row < pixels)[:, None] & owned[None, :], channel, owned


@triton.jit
def _groups(groups, per_group, TAKEN: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """A tile's groups and which exist, [GROUPS]; which channel belongs to which, [BLOCK, GROUPS]."""
    place = tl.arange(0, GROUPS)
    group = tl.program_id(1) * (TAKEN // per_group) + place
    known = (place < TAKEN // per_group) & (group < groups)
    member = (tl.arange(0, BLOCK) // per_group)[:, None] == place[None, :]
    return group, known, member


@triton.jit
def _by_group(values, member):
    """Sums over the channels of each group: [BLOCK] to [GROUPS]."""
    return tl.sum(tl.where(member, values[:, None], 0.0), 0)


@triton.jit
def _by_channel(values, member):
    """The value of each channel's group: [GROUPS] to [BLOCK]."""
    return tl.sum(tl.where(member, values[None, :], 0.0), 1)


@triton.jit
def _statistic(values, groups, group, known, member):
    """That of each channel's group in the program's image, [BLOCK]."""
    return _by_channel(tl.load(values + tl.program_id(2) * groups + group, known, 0.0), member)


@triton.jit
def _rows_inside(chunk, pixels, ROWS: tl.constexpr):
    return tl.maximum(tl.minimum(pixels - chunk * ROWS, ROWS), 0)


@triton.jit
def _partials(values, first, group, known, groups, chunks):
    """Statistics of some tiles of the program's image, [FOLD, GROUPS], and which tiles, [FOLD]."""
    chunk = first + tl.arange(0, FOLD)
    at = (tl.program_id(2) * chunks + chunk)[:, None] * groups + group[None, :]
    return tl.load(values + at, (chunk < chunks)[:, None] & known[None, :], 0.0), chunk


@triton.jit
def _total(values, group, known, groups, chunks, GROUPS: tl.constexpr):
    """Each group's sum over all tiles of the program's image, [GROUPS]."""
    total = tl.zeros([GROUPS], tl.float32)
    for first in range(0, chunks, FOLD):
        partial, _ = _partials(values, first, group, known, groups, chunks)
        total += tl.sum(partial, 0)
    return total


@triton.jit
def _moments(
    means, variances, group, known, pixels, groups, chunks, GROUPS: tl.constexpr, ROWS: tl.constexpr
):
    """Each group's mean and variance in the program's image, [GROUPS], by the law of total variance."""
    mean = tl.zeros([GROUPS], tl.float32)
    for first in range(0, chunks, FOLD):
        partial, chunk = _partials(means, first, group, known, groups, chunks)
        mean += tl.sum(partial * (_rows_inside(chunk, pixels, ROWS) / pixels)[:, None], 0)
    variance = tl.zeros([GROUPS], tl.float32)
    for first in range(0, chunks, FOLD):
        partial, chunk = _partials(means, first, group, known, groups, chunks)
        within, _ = _partials(variances, first, group, known, groups, chunks)
        share = (_rows_inside(chunk, pixels, ROWS) / pixels)[:, None]
        variance += tl.sum(share * (within + (partial - mean[None, :]) * (partial - mean[None, :])), 0)
    return mean, variance


@triton.jit
def _recomputed(x, dy, at, inside, average, inverse, scale, shift, SILU: tl.constexpr):
    """Normalised input and the gradient before SiLU, [ROWS, BLOCK], which is 0 outside the activation."""
    normed = (tl.load(x + at, inside, 0.0).to(tl.float32) - average[None, :]) * inverse[None, :]
    slope = tl.load(dy + at, inside, 0.0).to(tl.float32)
    if SILU:
        before = normed * scale[None, :] + shift[None, :]
        sigmoid = tl.sigmoid(before)
        slope *= sigmoid * (1.0 + before * (1.0 - sigmoid))
    return normed, slope
