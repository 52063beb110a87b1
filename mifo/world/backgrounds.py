"""The ten backgrounds, one for each prompt ending of Break-a-Scene's evaluation.

A background takes picture coordinates ``x`` (right) and ``y`` (down), both (n, H, W) in [0, 1], and five
numbers ``q`` = (q0 … q4), each (n, 1, 1) in [0, 1], that vary it; it returns colours (n, 3, H, W) in [0, 1].
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mifo.world.vocabulary import BACKGROUNDS

EDGE = 128.0  # edges are softened over about one pixel of a 128² picture


def rgb(like: Tensor, *colour: float) -> Tensor:
    return torch.tensor(colour, dtype=like.dtype, device=like.device).view(1, 3, 1, 1)


def cover(canvas: Tensor, distance: Tensor, colour: Tensor) -> Tensor:
    """Paint ``colour`` where the signed ``distance`` (n, H, W) is negative."""
    alpha = (0.5 - distance * EDGE).clamp(0, 1).unsqueeze(1)
    return canvas + (colour - canvas) * alpha


def gradient(t: Tensor, top: Tensor, bottom: Tensor) -> Tensor:
    """From the colour `top` where t is 0 to the colour `bottom` where t is 1."""
    return top + (bottom - top) * t.clamp(0, 1).unsqueeze(1)


def sky(y: Tensor, q: list[Tensor]) -> Tensor:
    shade = (q[4].unsqueeze(1) - 0.5) * 0.12
    return gradient(y * 1.4, rgb(y, 0.42, 0.68, 0.93) + shade, rgb(y, 0.82, 0.92, 0.98) + shade)


def cell_noise(ix: Tensor, iy: Tensor, seed: Tensor) -> Tensor:
    """A fixed pseudo-random number in [0, 1) for each integer cell."""
    value = torch.sin(ix * 12.9898 + iy * 78.233 + seed * 37.719) * 4375.8545
    return value - torch.floor(value)


def beach(x: Tensor, y: Tensor, q: list[Tensor]) -> Tensor:
    horizon, shore = 0.24 + 0.14 * q[0], 0.48 + 0.14 * q[1]
    canvas = sky(y, q)
    canvas = cover(canvas, torch.hypot(x - 0.1 - 0.8 * q[3], y - 0.12) - 0.06, rgb(x, 1.0, 0.93, 0.6))
    canvas = cover(canvas, horizon - y, rgb(x, 0.16, 0.56, 0.74))
    wave = shore + 0.018 * torch.sin(x * 14 + q[2] * 6.3)
    canvas = cover(canvas, wave - 0.03 - y, rgb(x, 0.93, 0.97, 0.98))
    return cover(canvas, wave - y, rgb(x, 0.93, 0.83, 0.6) + (q[3].unsqueeze(1) - 0.5) * 0.06)


def jungle(x: Tensor, y: Tensor, q: list[Tensor]) -> Tensor:
    canvas = gradient(y, rgb(x, 0.1, 0.3, 0.16), rgb(x, 0.05, 0.2, 0.1)).expand(-1, -1, x.shape[-2], -1)
    for layer, green in enumerate(((0.12, 0.38, 0.18), (0.2, 0.5, 0.2), (0.3, 0.6, 0.24))):
        count = 5.0 + layer
        u = x * count + q[layer] * 3 + layer * 0.37
        v = y * (count - 1) + q[3] * 2 + layer * 0.5
        ix, iy = torch.floor(u), torch.floor(v)
        turn = cell_noise(ix, iy, q[4] + layer) * math.pi
        dx, dy = u - ix - 0.5, v - iy - 0.5
        along = dx * torch.cos(turn) + dy * torch.sin(turn)
        across = dy * torch.cos(turn) - dx * torch.sin(turn)
        leaf = (torch.hypot(along / 0.48, across / 0.17) - 1) * 0.17 / count
        canvas = cover(canvas, leaf, rgb(x, *green))
    return canvas


def snow(x: Tensor, y: Tensor, q: list[Tensor]) -> Tensor:
    canvas = gradient(y * 1.5, rgb(x, 0.66, 0.74, 0.84), rgb(x, 0.82, 0.87, 0.93)).expand(
        -1, -1, x.shape[-2], -1
    )
    for layer, white in enumerate((0.88, 0.97)):
        wave = torch.sin(x * (5 + 3 * layer) + q[2 + layer] * 6.3)
        hill = 0.42 + 0.16 * layer + 0.1 * (q[layer] - 0.5) + 0.06 * wave
        canvas = cover(canvas, hill - y, rgb(x, white - 0.02, white, min(white + 0.03, 1.0)))
    ix, iy = torch.floor(x * 9 + q[0]), torch.floor(y * 9 + q[1])
    fx, fy = cell_noise(ix, iy, q[3]) * 0.6 + 0.2, cell_noise(iy, ix, q[4] + 1) * 0.6 + 0.2
    flake = torch.hypot(x * 9 + q[0] - ix - fx, y * 9 + q[1] - iy - fy) / 9 - 0.011
    return cover(canvas, flake, rgb(x, 1.0, 1.0, 1.0))


def street(x: Tensor, y: Tensor, q: list[Tensor]) -> Tensor:
    wall = rgb(x, 0.78, 0.62, 0.5) + torch.stack([q[0] - 0.5, q[1] - 0.5, q[2] - 0.5], 1) * 0.16
    canvas = wall.expand(-1, -1, x.shape[-2], x.shape[-1])
    rows, columns = y * 22, x * 11 + torch.floor(y * 22) * 0.5
    mortar = torch.minimum((rows - rows.round()).abs() / 22, (columns - columns.round()).abs() / 11) - 0.004
    canvas = cover(canvas, mortar, wall * 0.8)
    kerb = 0.5 + 0.1 * q[3]
    canvas = cover(canvas, kerb - y, rgb(x, 0.74, 0.73, 0.71))
    canvas = cover(canvas, kerb + 0.09 - y, rgb(x, 0.36, 0.37, 0.4))
    dash = x * 4 + q[4] * 4
    line = torch.maximum((y - kerb - 0.28).abs() - 0.016, ((dash - torch.floor(dash) - 0.5).abs() - 0.3) / 4)
    return cover(canvas, line, rgb(x, 0.94, 0.93, 0.88))


def pink_fabric(x: Tensor, y: Tensor, q: list[Tensor]) -> Tensor:
    turn = q[0] * math.pi
    along = x * torch.cos(turn) + y * torch.sin(turn)
    across = y * torch.cos(turn) - x * torch.sin(turn)
    fold = torch.sin((along + 0.06 * torch.sin(across * 9 + q[1] * 6.3)) * (14 + 8 * q[2]) + q[3] * 6.3)
    return rgb(x, 0.96, 0.68, 0.78) + (fold * 0.055 + (q[4] - 0.5) * 0.06).unsqueeze(1)


def wooden_floor(x: Tensor, y: Tensor, q: list[Tensor]) -> Tensor:
    planks = 5 + 3 * q[0]
    v = y * planks + q[1]
    row = torch.floor(v)
    u = x * 1.6 + cell_noise(row, row, q[2]) * 3
    tone = cell_noise(torch.floor(u), row, q[3]) - 0.5
    grain = torch.sin((y * 60 + 2 * torch.sin(x * 7 + row * 2)) * (1 + 0.2 * tone))
    wood = rgb(x, 0.66, 0.44, 0.26) + (tone * 0.14 + grain * 0.02 + (q[4] - 0.5) * 0.08).unsqueeze(1)
    seam = torch.minimum((v - v.round()).abs() / planks, (u - u.round()).abs() / 1.6) - 0.005
    return cover(wood, seam, wood * 0.55)


def city(x: Tensor, y: Tensor, q: list[Tensor]) -> Tensor:
    canvas = gradient(y * 1.5, rgb(x, 0.36, 0.33, 0.56), rgb(x, 0.96, 0.7, 0.55)).expand(
        -1, -1, x.shape[-2], -1
    )
    for layer, tone in enumerate(((0.42, 0.4, 0.55), (0.22, 0.22, 0.34))):
        columns = 9.0 - 2 * layer
        u = x * columns + q[layer] * 5
        column = torch.floor(u)
        top = 0.16 + 0.14 * layer + 0.26 * cell_noise(column, column, q[2 + layer])
        block = torch.maximum(top - y, ((u - column - 0.5).abs() - 0.44) / columns)
        canvas = cover(canvas, block, rgb(x, *tone))
        wx, wy = u * 4, (y - top) * 26
        lit = (cell_noise(torch.floor(wx), torch.floor(wy), q[4]) > 0.55).to(x.dtype)
        across, down = ((w - torch.floor(w) - 0.5).abs() - 0.28 for w in (wx, wy))
        inside = torch.maximum(torch.maximum(across, down) / 30, block + 0.01) + (1 - lit)
        canvas = cover(canvas, inside, rgb(x, 0.98, 0.88, 0.52))
    return cover(canvas, 0.72 - y, rgb(x, 0.4, 0.42, 0.45))


def mountain(x: Tensor, y: Tensor, q: list[Tensor]) -> Tensor:
    canvas = sky(y, q)
    for centre, high, tone in (
        (q[0] * 0.5, 0.2 + 0.12 * q[1], 0.0),
        (0.5 + q[2] * 0.5, 0.12 + 0.14 * q[3], 0.06),
    ):
        slope = high + (x - centre).abs() * 0.8 + 0.012 * torch.sin(x * 40 + q[4] * 6.3)
        canvas = cover(canvas, (slope - y) * 0.78, rgb(x, 0.46 + tone, 0.47 + tone, 0.55 + tone))
        cap = high + 0.13 + 0.03 * torch.sin(x * 30 + q[0] * 6.3)
        canvas = cover(canvas, torch.maximum(slope - y, y - cap), rgb(x, 0.97, 0.98, 1.0))
    meadow = 0.6 + 0.05 * torch.sin(x * 5 + q[2] * 6.3)
    return cover(canvas, meadow - y, rgb(x, 0.45, 0.68, 0.34))


def eiffel_tower(x: Tensor, y: Tensor, q: list[Tensor]) -> Tensor:
    canvas = sky(y, q)
    centre, top, foot = 0.2 + 0.6 * q[0], 0.04 + 0.06 * q[1], 0.74
    down = ((y - top) / (foot - top)).clamp(0, 1)
    half = 0.012 + 0.17 * down**2.2
    inner = (0.1 * ((down - 0.66) / 0.34).clamp(min=0) ** 0.5) * (down > 0.66)
    offset = (x - centre).abs()
    iron = rgb(x, 0.45, 0.36, 0.3) + (q[2].unsqueeze(1) - 0.5) * 0.08
    tower = torch.maximum(torch.maximum(offset - half, inner - offset), torch.maximum(top - y, y - foot))
    canvas = cover(canvas, tower, iron)
    for level, wide in ((0.4, 0.045), (0.66, 0.1)):
        bar = torch.maximum(offset - wide, (down - level).abs() * 0.7 - 0.014)
        canvas = cover(canvas, bar, iron * 0.8)
    lawn = 0.7 + 0.04 * (q[3] - 0.5)
    return cover(canvas, lawn - y, rgb(x, 0.55, 0.74, 0.4))


def water(x: Tensor, y: Tensor, q: list[Tensor]) -> Tensor:
    canvas = gradient(y, rgb(x, 0.3, 0.66, 0.82), rgb(x, 0.08, 0.38, 0.62)).expand(-1, -1, x.shape[-2], -1)
    rows = 9.0
    swing = torch.sin(x * (10 + 5 * q[0]) + torch.floor(y * rows) * 2.4 + q[1] * 6.3)
    ripple = y * rows + 0.18 * swing + q[2]
    crest = ((ripple - torch.floor(ripple) - 0.5).abs() - 0.07) / rows
    gaps = torch.sin(x * (17 + 6 * q[3]) + torch.floor(ripple) * 4.1 + q[4] * 6.3) * 0.02
    return cover(canvas, torch.maximum(crest, -gaps), rgb(x, 0.72, 0.9, 0.95))


_IN_ORDER = (beach, jungle, snow, street, pink_fabric, wooden_floor, city, mountain, eiffel_tower, water)
DRAWINGS: dict[str, Callable[[Tensor, Tensor, list[Tensor]], Tensor]] = dict(
    zip(BACKGROUNDS, _IN_ORDER, strict=True)
)
