"""Pictures of several methods under each other: a row per method, a column per prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from textwrap import wrap

from PIL import Image, ImageDraw
from torch import Tensor

from mifo.data.saved_pictures import Picture, as_image
from mifo.metrics.crops import mask_box
from mifo.report.content import LABELS
from mifo.report.drawing import draw_layout, font_for
from mifo.report.palette import INK, MUTED, PAPER, Colour

SIDE, GAP, MARGIN, TITLE = 216, 10, 28, 44


@dataclass(frozen=True)
class ComparedRow:
    """One method: what it is called, its pictures, and its scores by metric."""

    label: str
    pictures: Sequence[Picture]
    scores: Mapping[str, float]


def draw_comparison(
    title: str, source: Tensor, masks: Tensor, tokens: Sequence[str], rows: Sequence[ComparedRow]
) -> Image.Image:
    """Draw every row's pictures with their boxes, and above them the image that all have learned from.

    Args:
        source: (3, H, W), float in [0, 1] or uint8. masks: (N, H, W) in [0, 1], of `tokens`.
        rows: with pictures of the same prompts, in the same order.
    """
    prompts = [picture.prompt for picture in rows[0].pictures]
    cell = SIDE + GAP
    width = 2 * MARGIN + cell * (1 + len(prompts)) - GAP
    page = Image.new("RGB", (width, 2 * MARGIN + TITLE + cell * (1 + len(rows)) - GAP), PAPER)
    draw = ImageDraw.Draw(page)
    _write(draw, MARGIN, MARGIN, title, 24, INK)
    top = MARGIN + TITLE
    boxes = {token: mask_box(mask) for token, mask in zip(tokens, masks, strict=True)}
    page.paste(draw_layout(boxes, as_image(source), SIDE, labels=False), (MARGIN, top))
    # what the prompts share is the instances, which the colours of the boxes tell
    shared = _shared_words(prompts) if len(set(prompts)) > 1 else 0
    for column, prompt in enumerate(prompts, 1):
        lines = wrap(" ".join(prompt.split()[shared:]), 26)
        for place, line in enumerate(reversed(lines)):
            _write(draw, MARGIN + cell * column, top + SIDE - 20 * (place + 1), line, 15, INK)
    hint = "Learned from the image on the left; boxes of one colour are of one instance."
    _write(draw, MARGIN + cell, top, hint, 15, MUTED)
    for index, row in enumerate(rows, 1):
        y = top + cell * index
        lines = wrap(row.label, 24)
        for place, line in enumerate(lines):
            _write(draw, MARGIN, y + 22 * place, line, 18, INK)
        for place, (metric, value) in enumerate(row.scores.items()):
            told = f"{LABELS.get(metric, metric).lower()} {value:.2f}"
            _write(draw, MARGIN, y + 22 * len(lines) + 10 + 19 * place, told, 14, MUTED)
        for column, picture in enumerate(row.pictures, 1):
            drawn = draw_layout(picture.boxes, as_image(picture.image), SIDE, labels=False)
            page.paste(drawn, (MARGIN + cell * column, y))
    return page


def _shared_words(prompts: Sequence[str]) -> int:
    """How many words all prompts begin with."""
    words = zip(*(prompt.split() for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda same: len(set(same)) == 1, words))


def _write(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: float, colour: Colour) -> None:
    draw.text((x, y), text, font=font_for(text, size), fill=colour)
