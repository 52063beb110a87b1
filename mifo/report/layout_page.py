"""Layouts side by side, each over the prompts that it belongs to."""

from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from textwrap import wrap

from PIL import Image, ImageDraw

from mifo.report.drawing import Box, draw_layout, font_for
from mifo.report.palette import INK, PAPER

SIDE, SIDE_ALONE = 448, 768
GAP, PADDING = 16, 12
SIZE, LINE = 18, 24  # of a caption's letters, and from line to line


def draw_layouts(
    layouts: Sequence[tuple[Mapping[str, Box], Sequence[str]]], picture: Image.Image | None = None
) -> Image.Image:
    """Draw layouts in about as many rows as columns; one alone is larger.

    Args:
        layouts: the boxes of each, in [0, 1] by name, and its prompts, of which the first is written out.
        picture: what each is drawn over; None: an empty canvas.
    """
    side = SIDE if len(layouts) > 1 else SIDE_ALONE
    columns = ceil(sqrt(len(layouts)))
    drawn = [draw_layout(boxes, picture, side) for boxes, _ in layouts]
    width, height = drawn[0].size
    captions = [caption(prompts, width - 2 * PADDING) for _, prompts in layouts]
    pitch = height + 2 * PADDING + LINE * max(map(len, captions)) + GAP
    rows = ceil(len(layouts) / columns)
    page = Image.new("RGB", (columns * (width + GAP) - GAP, rows * pitch - GAP), PAPER)
    draw = ImageDraw.Draw(page)
    for index, (image, lines) in enumerate(zip(drawn, captions, strict=True)):
        row, column = divmod(index, columns)
        x, y = column * (width + GAP), row * pitch
        page.paste(image, (x, y))
        font = font_for("".join(lines), SIZE)  # one for all lines
        for place, line in enumerate(lines):
            draw.text((x + PADDING, y + height + PADDING + LINE * place), line, font=font, fill=INK)
    return page


def caption(prompts: Sequence[str], width: int) -> list[str]:
    """The first prompt and how many more there are, in lines that fit into `width` pixels."""
    # joined while lines are broken, so that the number keeps its word
    text = prompts[0] + (f" (+{len(prompts) - 1}\N{NO-BREAK SPACE}more)" if len(prompts) > 1 else "")
    font = font_for(prompts[0], SIZE)
    # wrapped by letters, so that a word longer than a line is broken too
    broken = (
        [line.replace("\N{NO-BREAK SPACE}", " ") for line in wrap(text, letters)]
        for letters in range(len(text) + 1, 0, -1)
    )
    return next(lines for lines in broken if all(font.getlength(line) <= width for line in lines))
