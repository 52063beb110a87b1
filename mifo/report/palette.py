"""One colour per instance, the same everywhere: masks, boxes, words and plots."""

import re
from collections.abc import Iterable
from itertools import cycle

Colour = tuple[int, int, int]

# Okabe and Ito's colour-blind-safe palette (jfly.uni-koeln.de/color), neighbours far apart.
PALETTE: tuple[Colour, ...] = (
    (0, 114, 178),  # blue
    (230, 159, 0),  # orange
    (0, 158, 115),  # bluish green
    (204, 121, 167),  # reddish purple
    (213, 94, 0),  # vermilion
    (86, 180, 233),  # sky blue
    (240, 228, 66),  # yellow
    (110, 110, 110),  # grey
)
INK: Colour = (24, 24, 27)
PAPER: Colour = (255, 255, 255)
MUTED: Colour = (98, 98, 108)  # words of less weight


def instance_colour(index: int) -> Colour:
    """Colour of instance `index`; it repeats after eight."""
    return PALETTE[index % len(PALETTE)]


def name_colours(names: Iterable[str]) -> dict[str, Colour]:
    """Colour of each box name: `<asset3>` has that of instance 3, other words the last colours left."""
    names = list(names)
    numbers = {name: int(match[1]) for name in names if (match := re.fullmatch(r"<asset(\d+)>", name))}
    taken = {index % len(PALETTE) for index in numbers.values()}
    free = cycle(
        [index for index in reversed(range(len(PALETTE))) if index not in taken] or [len(PALETTE) - 1]
    )
    return {name: instance_colour(numbers[name] if name in numbers else next(free)) for name in names}


def luminance(colour: Colour) -> float:
    """Relative luminance in [0, 1] (WCAG 2.2)."""
    linear = [
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
        for channel in (value / 255 for value in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: Colour, second: Colour) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def text_colour(background: Colour) -> Colour:
    """Ink or paper, whichever is easier to read on `background`."""
    return max((PAPER, INK), key=lambda colour: contrast(colour, background))


def hexadecimal(colour: Colour) -> str:
    return "#" + bytes(colour).hex()
