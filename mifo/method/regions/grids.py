"""Boxes as grids of pixels, and grids at other resolutions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mifo.method.regions.boxes import box_edges


def rasterise_boxes(
    boxes: Sequence[Sequence[float]], side: int, device: torch.device | None = None
) -> Tensor:
    """Boxes (S, 4) in [0, 1] as bool grids (S, side, side), filled from round(x0·side) to round(x1·side) − 1.

    A small box may hold no pixel of a coarse grid; see `check_boxes`.
    """
    grid = torch.zeros(len(boxes), side, side, dtype=torch.bool)
    for subject, box in enumerate(boxes):
        x0, y0, x1, y1 = box_edges(box, side)
        grid[subject, y0:y1, x0:x1] = True
    return grid.to(device)


def resize_shapes(shapes: Tensor, side: int) -> Tensor:
    """Bool shapes (B, S, R, R) at another resolution (B, S, side, side), by nearest-exact."""
    return F.interpolate(shapes.float(), size=(side, side), mode="nearest-exact").bool()
