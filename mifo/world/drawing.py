"""The scenes of `mifo.world.drawn`: words and hues by chance, places by the outlines of the things."""

import dataclasses
import random
from collections.abc import Sequence
from functools import cache
from itertools import combinations, pairwise

import torch
from torch import Tensor

from mifo.world.drawn import DrawnSettings, check_drawn
from mifo.world.scenes import Placements, draw, draw_things, mask_boxes, scene_batch
from mifo.world.spec import SceneSpec, ThingSpec, is_unseen
from mifo.world.vocabulary import BACKGROUNDS, COLOURS, PATTERNS, THINGS

LEAST_DIFFERENCE = 0.14
"""Least mean difference of two things' pixels, in [0, 1], drawn in the same pose and at the same place."""

LEAST_VISIBLE = 0.5
"""Least share of a thing that others leave visible."""

OVERLAP = 0.3
"""Share of the smaller of two neighbours that lies behind or before the other."""

_GAP = 0.04  # between things that stand apart, as a share of the picture's side
_LARGEST = 0.25  # half extent
_SIDE = 64  # of the drawings that are compared
_UNNAMED_HUES = (43, 78, 155, 200, 251, 298)
_SKY = ("with a city in the background", "in the snow", "with a mountain in the background")
_GROUNDS = {
    "boat": ("at the beach", "floating on top of water"),
    "fish": ("at the beach", "floating on top of water", "on top of a wooden floor"),
    "balloon": _SKY,
    "rocket": _SKY,
}  # of things that do not stand anywhere


@cache
def draw_spec(drawn: DrawnSettings) -> SceneSpec:
    """The scene that `drawn` names, with the place and the size of every thing; the same in every process.

    Words, hues and seeds are tried until all things differ to the eye and stay visible.

    Raises:
        MifoError: see `check_drawn`.
    """
    check_drawn(drawn)
    rng = random.Random(repr(drawn))
    while True:
        words = _words(drawn, rng)
        grounds = [_GROUNDS[thing.thing] for thing in words if thing.thing in _GROUNDS]
        spec = SceneSpec(words, rng.choice(grounds[0] if grounds else BACKGROUNDS), rng.randrange(10**6))
        batch = scene_batch(spec)
        things, poses = batch.identities[0], batch.placements[0]
        if not _all_differ(draw_things(things, _in_middle(poses, upright=True), _SIDE)):
            continue
        coverage = draw_things(things, _in_middle(poses), 2 * _SIDE)[1]
        reach = (mask_boxes(coverage) - 0.5) / 0.4  # of outlines from the centre, for a size of 1
        centres, size = _places(reach.tolist(), drawn.places, rng)
        for thing, centre in zip(words, centres, strict=True):
            thing.centre, thing.size = centre, size
        batch = scene_batch(spec)
        visible = draw(batch, _SIDE, with_background=False)[1][0].sum((-2, -1))
        whole = draw_things(batch.identities[0], batch.placements[0], _SIDE)[1].sum((-2, -1))
        if (visible / whole).min() >= LEAST_VISIBLE:
            return spec


def _words(drawn: DrawnSettings, rng: random.Random) -> list[ThingSpec]:
    if drawn.kind == "alike":
        assert drawn.hue_distance is not None  # `check_drawn` has seen it
        thing, start = rng.choice(THINGS), rng.randrange(360)
        hues = [_nearest_unseen(start + place * drawn.hue_distance) for place in range(drawn.count)]
        patterns = rng.sample(PATTERNS, len(PATTERNS)) * drawn.count
        if drawn.pattern == "same":
            patterns = [patterns[0]] * drawn.count
        rng.shuffle(hues)
        return [
            ThingSpec(thing, pattern=pattern, hue=float(hue))
            for hue, pattern in zip(hues, patterns, strict=False)
        ]
    if drawn.kind == "mixed":
        kinds, colours = rng.sample(THINGS, drawn.count), rng.sample(list(COLOURS), len(COLOURS)) * 2
        return [ThingSpec(t, c, rng.choice(PATTERNS)) for t, c in zip(kinds, colours, strict=False)]
    kinds, unnamed = rng.sample(THINGS, 2), rng.sample(_UNNAMED_HUES, 2)
    return [
        ThingSpec(kinds[slot // 2 % 2], pattern=rng.choice(PATTERNS[1:]), hue=float(unnamed[slot % 2]))
        for slot in range(drawn.count)
    ]


def _nearest_unseen(hue: float) -> int:
    """The whole degree nearest to `hue` that pretraining never saw, in [0, 360)."""
    unseen = [degree for degree in range(360) if is_unseen(degree)]
    return min(unseen, key=lambda degree: abs((degree - hue + 180) % 360 - 180))


def _in_middle(poses: Placements, upright: bool = False) -> Placements:
    """The same things in the middle of canvases of their own, in one pose where `upright`."""
    middle = dataclasses.replace(
        poses, centre=torch.full_like(poses.centre, 0.5), size=torch.full_like(poses.size, 0.4)
    )
    if upright:
        return dataclasses.replace(middle, turn=0 * poses.turn, mirror=torch.ones_like(poses.mirror))
    return middle


def _all_differ(drawings: tuple[Tensor, Tensor]) -> bool:
    """Whether every two of the things (m, 3, H, W), with their coverage (m, H, W), differ to the eye."""
    colours, coverage = drawings
    alone = colours * coverage.unsqueeze(1)
    for a, b in combinations(range(len(alone)), 2):
        gap = (alone[a] - alone[b]).abs().mean(0)
        if gap.sum() < LEAST_DIFFERENCE * ((coverage[a] + coverage[b]) > 0.01).sum():
            return False
    return True


def _places(
    reach: Sequence[Sequence[float]], places: str, rng: random.Random
) -> tuple[list[tuple[float, float]], float]:
    """The centres of all things, and their size, the largest with which they fit in rows.

    Args:
        reach: of each thing's outline left, up, right and down of its centre, for a size of 1.
    """
    rows = round(len(reach) ** 0.5)
    numbers = [len(reach) // rows + (row < len(reach) % rows) for row in range(rows)]
    starts = [sum(numbers[:row]) for row in range(rows)]
    in_rows = [list(range(start, start + number)) for start, number in zip(starts, numbers, strict=True)]
    gap, overlap = (_GAP, 0.0) if places == "apart" else (0.0, OVERLAP * (places == "overlapping"))

    def lined_up(extents: Sequence[float]) -> tuple[list[float], float, float]:
        """Where things of these extents begin on a line for a size of 1, their whole extent, their gaps."""
        begins = [0.0]
        for one, other in pairwise(extents):
            begins.append(begins[-1] + one - overlap * min(one, other))
        return begins, begins[-1] + extents[-1], gap * (len(extents) - 1)

    widths, heights = [r - left for left, _, r, _ in reach], [d - up for _, up, _, d in reach]
    across = [lined_up([widths[thing] for thing in row]) for row in in_rows]
    down = lined_up([max(heights[thing] for thing in row) for row in in_rows])
    size = min(_LARGEST, *((1 - 2 * _GAP - gaps) / extent for _, extent, gaps in (*across, down)))
    centres = []
    y = _GAP + rng.random() * (1 - 2 * _GAP - down[2] - size * down[1])
    for number, row in enumerate(in_rows):
        begins, extent, gaps = across[number]
        x = _GAP + rng.random() * (1 - 2 * _GAP - gaps - size * extent)
        middle = y + number * gap + size * (down[0][number] + max(heights[thing] for thing in row) / 2)
        for place, thing in enumerate(row):
            left, up, _, low = reach[thing]
            centres.append((x + place * gap + size * (begins[place] - left), middle - size * (up + low) / 2))
    return centres, size
