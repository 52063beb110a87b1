"""Scenes that are drawn by kind, likeness and seed. Names and settings of them import no torch.

A name says all of it: `alike-3-hue12-same-touching-7` holds three things of one category whose hues lie 12
degrees apart, of one pattern, side by side without a gap, drawn from seed 7; `mixed-4-apart-0` and
`rare-2-overlapping-1` hold other categories and unnamed hues. Every hue is one that pretraining never saw.
"""

import re
from dataclasses import dataclass
from typing import Any

from mifo.errors import MifoError, check_known
from mifo.world.spec import MOST_THINGS

KINDS = ("alike", "mixed", "rare")
PATTERNS_OF = ("same", "other")
PLACES = ("apart", "touching", "overlapping")


@dataclass(unsafe_hash=True)
class DrawnSettings:
    """A scene whose seed draws what its kind and its degrees leave open."""

    # alike: one category | mixed: a category and a colour each | rare: two categories, unnamed hues
    kind: str
    count: int  # of things, 2 to 10
    seed: int
    places: str = "apart"  # apart | touching | overlapping: their outlines in the source picture
    hue_distance: float | None = None  # of look-alikes: degrees from one thing's body to the next one's
    pattern: str | None = None  # of look-alikes: same | other

    def __post_init__(self) -> None:
        if self.hue_distance is not None:  # 12 and 12.0 are one scene, which is drawn from what is written
            self.hue_distance = float(self.hue_distance)


_NAME = re.compile(
    rf"(?P<kind>{'|'.join(KINDS)})-(?P<count>\d+)"
    rf"(-hue(?P<hue_distance>\d+)-(?P<pattern>{'|'.join(PATTERNS_OF)}))?"
    rf"-(?P<places>{'|'.join(PLACES)})-(?P<seed>\d+)"
)

HUES = (0, 12, 40)
"""Degrees of likeness in the benchmark: the same hue, hues within one colour word, other colours."""

_COUNTS = (2, 3, 4, 5)
BENCHMARK = (
    # each number of things and each distance of hues stands in every kind of place
    *(
        f"alike-{count}-hue{hue}-{pattern}-{PLACES[(i + j) % 3]}-0"
        for i, count in enumerate(_COUNTS)
        for j, hue in enumerate(HUES)
        for pattern in PATTERNS_OF
    ),
    *(
        f"{kind}-{count}-{places}-{seed}"
        for kind in ("mixed", "rare")
        for count in _COUNTS
        for places in PLACES
        for seed in (0, 1)
    ),
)
"""24 scenes of each kind, for tables."""

STRESS = tuple(
    f"{kind}-{count}{likeness}-apart-{seed}"
    for kind, likeness in (("alike", "-hue36-other"), ("mixed", ""))
    for count in (2, 4, 6, 8, 10)
    for seed in (200, 201, 202, 203)
)
"""Scenes with up to ten things."""

TUNING = (
    "alike-2-hue12-same-overlapping-100",
    "alike-3-hue0-other-touching-101",
    "alike-4-hue12-other-apart-102",
    "alike-5-hue0-same-apart-103",
    "mixed-3-touching-104",
    "rare-4-apart-105",
    "alike-3-hue40-same-overlapping-106",
    "mixed-5-overlapping-107",
)
"""Scenes on which settings are chosen; no table uses them."""


def drawn_settings(name: str) -> dict[str, Any] | None:
    """The fields of `DrawnSettings` that a scene's name says; None for a name of another form."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    said = {key: value for key, value in found.groupdict().items() if value is not None}
    return {key: int(value) if value.isdecimal() else value for key, value in said.items()}


def drawn_option(name: str) -> dict[str, Any] | None:
    """What `instances=NAME` stands for; None where the name is none of a drawn scene."""
    scene = drawn_settings(name)
    return scene and {"name": name, "scene": scene}


def check_drawn(drawn: DrawnSettings) -> None:
    """Refuse unknown words, too many things, and degrees that the kind lacks or cannot have."""
    check_known("instances.scene.kind", drawn.kind, KINDS)
    check_known("instances.scene.places", drawn.places, PLACES)
    if not 2 <= drawn.count <= MOST_THINGS:
        raise MifoError(f"instances.scene.count={drawn.count}: take 2 to {MOST_THINGS} things.")
    if drawn.kind != "alike" and (drawn.hue_distance is not None or drawn.pattern is not None):
        raise MifoError(
            f"instances.scene: hue_distance and pattern are degrees of kind=alike; leave them out of "
            f"kind={drawn.kind}."
        )
    if drawn.kind == "alike" and (drawn.hue_distance is None or drawn.pattern not in PATTERNS_OF):
        raise MifoError(
            "instances.scene: kind=alike needs its likeness; give hue_distance in degrees and pattern=same "
            "or pattern=other."
        )
    if drawn.hue_distance and not 0 < drawn.hue_distance * drawn.count <= 360:
        raise MifoError(
            f"instances.scene.hue_distance={drawn.hue_distance:g} times {drawn.count} things is more than "
            "the circle of hues has; take a smaller one."
        )
