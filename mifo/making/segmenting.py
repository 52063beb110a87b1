"""Masks of things that boxes or clicks point at, by Segment Anything 2 (arXiv 2408.00714)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor
from transformers import Sam2Model, Sam2Processor

from mifo.errors import MifoError, first_line


@dataclass(frozen=True)
class Thing:
    """What points at one thing, in shares of the picture's width and height.

    Attributes:
        box: [x0, y0, x1, y1]. points: (x, y, 1 on the thing or 0 beside it).
    """

    name: str
    box: tuple[float, ...] | None = None
    points: list[tuple[float, float, int]] = field(default_factory=list)


class Segmenter:
    """A Segment Anything 2 that looks at one picture after another.

    Args:
        source: a folder or a hub id of the model in transformers' layout.

    Raises:
        MifoError: the model cannot be had.
    """

    def __init__(self, source: str, device: torch.device) -> None:
        try:
            folder = Path(source).expanduser()
            if not folder.is_dir():  # transformers would ask the hub for minutes where there is no network
                folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
            self._processor = Sam2Processor.from_pretrained(folder)
            self._model = Sam2Model.from_pretrained(folder).to(device).eval()
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = first_line(error)
            raise MifoError(
                f"segmenter={source} cannot be loaded ({reason}); connect once to fetch its weights, or name "
                "a folder of a Segment Anything 2."
            ) from error

    @torch.inference_mode()
    def look(self, picture: Image.Image) -> None:
        """Compute what the masks of a picture share."""
        image = self._processor(images=picture, return_tensors="pt").to(self._model.device)
        self._picture, self._size = picture, image["original_sizes"]
        self._seen = self._model.get_image_embeddings(image["pixel_values"])

    @torch.inference_mode()
    def mask(self, thing: Thing) -> Tensor:
        """The mask (H, W), bool, of a thing of the picture; of several that a click may mean, the one the
        model trusts most."""
        pointed: dict[str, Any] = {}
        if thing.box is not None:
            edges = [edge * self._picture.size[i % 2] for i, edge in enumerate(thing.box)]
            pointed["input_boxes"] = [[edges]]
        if thing.points:
            places = [[x * self._picture.width, y * self._picture.height] for x, y, _ in thing.points]
            pointed["input_points"] = [[places]]
            pointed["input_labels"] = [[[label for *_, label in thing.points]]]
        given = self._processor(**pointed, original_sizes=self._size, return_tensors="pt")
        given.pop("original_sizes", None)
        found = self._model(
            image_embeddings=self._seen, **given.to(self._model.device), multimask_output=thing.box is None
        )
        masks = self._processor.post_process_masks(found.pred_masks.float().cpu(), self._size.cpu())[0]
        return masks[0, found.iou_scores[0, 0].argmax()] > 0
