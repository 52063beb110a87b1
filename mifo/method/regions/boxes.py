"""Boxes: their edges in pixels, and which boxes are refused. This file imports no torch."""

from collections.abc import Mapping, Sequence

from mifo.errors import MifoError


def box_edges(box: Sequence[float], side: int) -> tuple[int, int, int, int]:
    """Pixel edges (x0, y0, x1, y1) of a box in [0, 1] on a grid of side × side; x1 and y1 are exclusive.

    Halves go to the even neighbour (Python's `round`), as in MIFO's and Bounded Attention's implementations.
    """
    x0, y0, x1, y1 = (round(edge * side) for edge in box)
    return x0, y0, x1, y1


def inner_box(box: Sequence[float], margin: float) -> tuple[float, float, float, float]:
    """The box with each side moved in by `margin`, a share of the picture's side."""
    x0, y0, x1, y1 = box
    return x0 + margin, y0 + margin, x1 - margin, y1 - margin


def check_boxes(boxes: Mapping[str, Sequence[float]], side: int | None = None, margin: float = 0) -> None:
    """Refuse boxes that cannot be drawn.

    Args:
        boxes: [x0, y0, x1, y1] in [0, 1] by the name of the subject.
        side: side of the grid on which shapes are found; each inner box must hold a pixel of it.
        margin: see `inner_box`.

    Raises:
        MifoError: a box is not four numbers, leaves [0, 1], or is upside down; or its inner box is smaller
            than a pixel of the grid.
    """
    for name, box in boxes.items():
        shown = f"The box of {name}, {list(box)},"
        if len(box) != 4:
            raise MifoError(f"{shown} needs four numbers: [x0, y0, x1, y1].")
        x0, y0, x1, y1 = box
        if not all(0 <= edge <= 1 for edge in box):
            raise MifoError(f"{shown} leaves the picture: give [x0, y0, x1, y1] between 0 and 1.")
        if x0 >= x1 or y0 >= y1:
            raise MifoError(f"{shown} is upside down or empty: give [x0, y0, x1, y1], x0 < x1, y0 < y1.")
        if side is not None:
            left, top, right, bottom = box_edges(inner_box(box, margin), side)
            if left >= right or top >= bottom:
                least = f"1/{side} of the picture" + (" and twice guidance.margin" if margin else "")
                raise MifoError(f"{shown} is too small: make each side at least {least}.")
