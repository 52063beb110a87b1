"""Masks of things that boxes or clicks point at, by Segment Anything 2 (arXiv 2408.00714)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Sam2Model, Sam2Processor

from mifo.errors import MifoError


@dataclass(frozen=True)
class Thing:
    """What points at one thing, in shares of the picture's width and height.

    Attributes:
        box: [x0, y0, x1, y1]. points: (x, y, 1 on the thing or 0 beside it).
    """

    name: str
    box: tuple[float, ...] | None = None
    points: list[tuple[float, float, int]] = field(default_factory=list)


@torch.inference_mode()
def segment(source: str, picture: Image.Image, things: Sequence[Thing], device: torch.device) -> Tensor:
    """Masks (N, H, W), bool, of N things; of several that a click may mean, the one the model trusts most.

    Args:
        source: a folder or a hub id of a Segment Anything 2 in transformers' layout.

    Raises:
        MifoError: the model cannot be had.
    """
    try:
        processor = Sam2Processor.from_pretrained(source)
        model = Sam2Model.from_pretrained(source).to(device).eval()
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MifoError(
            f"segmenter={source} cannot be loaded ({reason}); connect once to fetch its weights, or name a "
            "folder of a Segment Anything 2."
        ) from error
    image = processor(images=picture, return_tensors="pt").to(device)
    seen = model.get_image_embeddings(image["pixel_values"])
    masks = []
    for thing in things:
        pointed: dict[str, Any] = {}
        if thing.box is not None:
            pointed["input_boxes"] = [[[edge * picture.size[i % 2] for i, edge in enumerate(thing.box)]]]
        if thing.points:
            places = [[x * picture.width, y * picture.height] for x, y, _ in thing.points]
            pointed["input_points"] = [[places]]
            pointed["input_labels"] = [[[label for *_, label in thing.points]]]
        sizes = {"original_sizes": image["original_sizes"], "return_tensors": "pt"}
        given = processor(**pointed, **sizes).to(device)
        given.pop("original_sizes", None)
        found = model(image_embeddings=seen, **given, multimask_output=thing.box is None)
        sized = processor.post_process_masks(found.pred_masks.float().cpu(), image["original_sizes"].cpu())[0]
        masks.append(sized[0, found.iou_scores[0, 0].argmax()] > 0)
    return torch.stack(masks)
