"""Layouts: a prompt and a box for each thing in it, from the configuration to checked boxes."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

from mifo.errors import MifoError, check_known
from mifo.method.prompts.instances import check_instances, check_placeholders
from mifo.method.regions.boxes import check_boxes


@dataclass
class LayoutSettings:
    """A prompt, its boxes, and the endings that make several prompts of it.

    `{instances}` in the prompt stands for "<asset0> and <asset1> and …", as in learning, and `{ending}`
    for each ending in turn. `{subset}` stands for each non-empty subset of the instances in turn, whose boxes
    alone are used (Break-a-Scene's evaluation prompts, arXiv 2305.16311, section 4). A box
    [x0, y0, x1, y1] has edges in [0, 1], x from the left and y from the top; its key is an instance token
    (`<asset0>`, or `asset0` on the command line) or words of the prompt.
    """

    prompt: str = "a photo of {instances} {ending}"
    endings: list[str] = field(default_factory=lambda: [""])
    boxes: dict[str, Any] = field(default_factory=dict)
    arrange: str | None = None  # boxes for all instances when `boxes` is empty: see ARRANGEMENTS


Boxes = dict[str, tuple[float, float, float, float]]


@dataclass(frozen=True)
class Layout:
    """One prompt with its boxes, ready to be drawn or synthesised."""

    prompt: str
    boxes: Boxes


def layouts(settings: LayoutSettings, tokens: Sequence[str]) -> list[Layout]:
    """Every layout that `settings` describe for the instance `tokens`, by subset and then by ending.

    Raises:
        MifoError: a box is impossible, or a prompt is empty, lacks a box's key, names an unknown instance or
            holds an unknown placeholder.
    """
    check_known("layout.arrange", settings.arrange or "null", (*ARRANGEMENTS, "null"))
    # Hydra's command line takes no "<" in a key, so that asset0 stands for <asset0> too
    boxes = {
        re.sub(r"^asset\d+$", r"<\g<0>>", name): _numbers(name, box) for name, box in settings.boxes.items()
    }
    if not settings.endings:
        raise MifoError('layout.endings is empty, so there is no prompt; give at least one, [""] for none')
    check_placeholders("layout.prompt", settings.prompt, ("instances", "subset", "ending"))
    if len(settings.endings) > 1 and "{ending}" not in settings.prompt:
        raise MifoError(
            f"layout.prompt={settings.prompt} has no {{ending}}, so that {len(settings.endings)} "
            "layout.endings would give the same pictures; put {ending} into it, or give one ending"
        )
    for ending in settings.endings:
        check_placeholders("layout.endings", ending)
    found = []
    for subset in _subsets(tokens) if "{subset}" in settings.prompt else [tokens]:
        left_out = {*tokens} - {*subset}
        own: Mapping[str, Sequence[float]] = {
            name: box for name, box in boxes.items() if name not in left_out
        }
        if not boxes and settings.arrange:
            own = ARRANGEMENTS[settings.arrange](subset)
        check_boxes(own)
        checked = {name: (x0, y0, x1, y1) for name, (x0, y0, x1, y1) in own.items()}
        named = re.sub(r"\{(instances|subset)\}", " and ".join(subset), settings.prompt)
        for ending in settings.endings:
            prompt = " ".join(named.replace("{ending}", ending).split())
            if not prompt:
                raise MifoError("layout.prompt and its ending leave an empty prompt; give words to draw")
            check_instances(prompt, own, tokens)
            found.append(Layout(prompt, checked))
    return found


def _subsets(tokens: Sequence[str]) -> Iterator[list[str]]:
    """Every non-empty subset, by size and then by position."""
    for size in range(1, len(tokens) + 1):
        yield from map(list, combinations(tokens, size))


def _numbers(name: str, box: Any) -> tuple[float, ...]:
    if not isinstance(box, list | tuple) or not all(isinstance(edge, int | float) for edge in box):
        raise MifoError(f"layout.boxes.{name}={box} is no box; give four numbers, [x0, y0, x1, y1]")
    return tuple(box)


def _row(tokens: Sequence[str], margin: float = 0.04) -> Boxes:
    """Boxes of one size from left to right, in the lower middle where things stand on the ground."""
    width = (1 - margin) / len(tokens)
    side = min(width - margin, 0.6)
    return {
        token: (left, 0.55 - side / 2, left + side, 0.55 + side / 2)
        for i, token in enumerate(tokens)
        for left in [margin + i * width + (width - margin - side) / 2]
    }


def _spread(tokens: Sequence[str], margin: float = 0.04) -> Boxes:
    """Squares of one size with air between them in two staggered columns, the first at the upper left."""
    places = -(-len(tokens) // 2)
    pitch = (1 - margin) / places
    side = min(0.42, 0.72 * pitch)
    boxes = {}
    for i, token in enumerate(tokens):
        right = i % 2
        in_column = (len(tokens) + 1 - right) // 2
        x = 0.73 if right else 0.27
        y = 0.5 + (i // 2 - (in_column - 1) / 2) * pitch
        if len(tokens) == 2:
            y += 0.18 if right else -0.18
        boxes[token] = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    return boxes


def _grid(tokens: Sequence[str], fill: float) -> Boxes:
    """Squares in rows, from the upper left; a side is `fill` times the distance of their middles."""
    rows = round(len(tokens) ** 0.5)
    columns = -(-len(tokens) // rows)
    pitch = 0.92 / (columns - 1 + fill)
    side, boxes = pitch * fill, {}
    for i, token in enumerate(tokens):
        row, column = divmod(i, columns)
        in_row = min(columns, len(tokens) - row * columns)
        x = 0.5 + (column - (in_row - 1) / 2) * pitch
        y = 0.5 + (row - (rows - 1) / 2) * pitch
        boxes[token] = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    return boxes


ARRANGEMENTS: dict[str, Callable[[Sequence[str]], Boxes]] = {
    "row": _row,
    "spread": _spread,
    "apart": partial(_grid, fill=0.85),
    "touching": partial(_grid, fill=1.0),
    "overlapping": partial(_grid, fill=1.3),
}
