"""A scene in words, and the check of its words. This file imports no torch."""

from collections.abc import Collection
from dataclasses import dataclass

from mifo.errors import MifoError
from mifo.world.vocabulary import BACKGROUNDS, COLOURS, HELD_OUT_HUES, PATTERNS, THINGS

MAX_THINGS = 4  # of a scene of pretraining
MOST_THINGS = 10  # of a scene of the benchmark, whose prompts hold 32 tokens


@dataclass
class ThingSpec:
    """One thing of a scene in words; what the words leave open is drawn from the scene's seed.

    `hue` in degrees stands for a body colour that no colour word names; `centre` and `size` (half extent) are
    shares of the picture's side.
    """

    thing: str
    colour: str | None = None
    pattern: str = "plain"
    centre: tuple[float, float] | None = None
    size: float | None = None
    hue: float | None = None


@dataclass
class SceneSpec:
    """A scene of the benchmark world: never a scene of pretraining, since its hues are held out there."""

    things: list[ThingSpec]
    background: str
    seed: int = 0


def check_scene(spec: SceneSpec) -> None:
    """Refuse unknown words, hues that pretraining saw, and other than 1 to `MOST_THINGS` things."""
    if not 1 <= len(spec.things) <= MOST_THINGS:
        raise MifoError(f"instances.scene.things: {len(spec.things)} things; take 1 to {MOST_THINGS}.")
    for thing in spec.things:
        check_word("thing", thing.thing, THINGS)
        check_word("pattern", thing.pattern, PATTERNS)
        if thing.hue is None:
            check_word("colour", thing.colour, COLOURS)
        else:
            _check_hue(thing, thing.hue)
    check_word("background", spec.background, BACKGROUNDS)


def check_word(kind: str, word: str | None, options: Collection[str]) -> None:
    """Refuse a word that is none of `options`; `kind` says what it describes."""
    if word not in options:
        raise MifoError(f"instances.scene: {kind} '{word}' is not known; choose one of {', '.join(options)}.")


def is_unseen(hue: float) -> bool:
    """Whether pretraining never saw a body of this hue in degrees, within a colour word or between two."""
    low, high = HELD_OUT_HUES
    shares = [((hue - first) % 360) / (last - first) for first, last in COLOURS.values()]
    return all(low <= share <= high or share > 1 for share in shares)


def _check_hue(thing: ThingSpec, hue: float) -> None:
    """Refuse a hue that is given together with a colour word, or that pretraining may have seen."""
    if thing.colour is not None:
        raise MifoError(
            f"instances.scene: the {thing.thing} has the colour {thing.colour} and the hue {hue:g}; "
            "give one of them."
        )
    for word, (low, high) in COLOURS.items():
        if (hue - low) % 360 <= high - low and not is_unseen(hue):
            raise MifoError(
                f"instances.scene: the hue {hue:g} lies inside '{word}' ({low:g} to {high:g}), where "
                f"pretraining may have seen it; take colour: {word}, or a hue between two words."
            )
