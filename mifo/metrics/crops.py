"""Parts of pictures that are compared: instances of the source on black, and the boxes of made pictures."""

from collections.abc import Sequence

from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.transforms.functional import center_crop

from mifo.errors import MifoError

Box = Sequence[float]


def pad_square(image: Tensor) -> Tensor:
    """Centre `image` (…, H, W) on a black square of side max(H, W)."""
    return center_crop(image, [max(image.shape[-2:])] * 2)


def crop_box(image: Tensor, box: Box) -> Tensor:
    """Cut `box` [x0, y0, x1, y1] in [0, 1] out of `image` (C, H, W), at least one pixel.

    Edges are at round(x·W) and round(y·H), as in the method's rasterised boxes.
    """
    height, width = image.shape[-2:]
    left, top = min(round(box[0] * width), width - 1), min(round(box[1] * height), height - 1)
    right, bottom = max(round(box[2] * width), left + 1), max(round(box[3] * height), top + 1)
    return image[:, top:bottom, left:right]


def mask_box(mask: Tensor) -> tuple[float, float, float, float]:
    """Return the smallest box [x0, y0, x1, y1] in [0, 1] around the pixels of `mask` (H, W) over 0.5."""
    marked = mask > 0.5
    if not marked.any():
        raise MifoError("A mask has no pixel over 0.5: give every instance a mask that covers it.")
    (left, top, right, bottom), (height, width) = masks_to_boxes(marked[None])[0].tolist(), mask.shape
    return left / width, top / height, (right + 1) / width, (bottom + 1) / height


def reference_crops(image: Tensor, masks: Tensor) -> list[Tensor]:
    """Cut each instance out of the source `image` (3, H, W) in [0, 1], masked on black.

    `masks` is (N, H, W) in [0, 1]. As in Break-a-Scene (arXiv 2305.16311, section 4), what is no instance is
    black; the crop is the bounding box of the mask, so that it compares with a box crop.
    """
    return [crop_box(image * mask, mask_box(mask)) for mask in masks]
