"""Masks of what is clicked in the browser."""

import threading
from io import BytesIO
from typing import Any

import torch
from PIL import Image

from mifo.data.saved_pictures import as_image
from mifo.errors import MifoError
from mifo.studio.kept import as_url, content


class Clicks:
    """A Segment Anything 2, loaded at the first click; on the CPU, since the GPU is for learning.

    Args:
        source: see `mifo.making.segmenting.Segmenter`.
    """

    def __init__(self, source: str) -> None:
        self._source, self._lock = source, threading.Lock()
        self._segmenter: Any = None
        self._seen = ""

    def mask(self, url: str, points: list[tuple[float, float, int]]) -> str:
        """A PNG of the mask of what is clicked in a picture, both as data URLs; `points` as in `Thing`.

        Raises:
            MifoError: the model cannot be had, or finds nothing.
        """
        from mifo.making.segmenting import Segmenter, Thing  # late, since it loads for seconds

        with self._lock:
            self._segmenter = self._segmenter or Segmenter(self._source, torch.device("cpu"))
            if url != self._seen:
                self._segmenter.look(Image.open(BytesIO(content(url))).convert("RGB"))
                self._seen = url
            mask = self._segmenter.mask(Thing("", None, points))
        if not mask.any():
            raise MifoError("nothing was found there; click elsewhere, or paint the instance.")
        return as_url(as_image(mask[None].float()), "PNG")
