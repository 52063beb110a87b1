"""The contact sheet as one PNG, drawn at twice its nominal size so that it is sharp on dense screens."""

import re

from PIL import Image, ImageDraw

from mifo.data.saved_pictures import Picture, as_image
from mifo.metrics.crops import mask_box
from mifo.report.content import EXPLANATIONS, LABELS, Sheet
from mifo.report.drawing import draw_layout, fit, font_for
from mifo.report.masked_picture import draw_masks
from mifo.report.palette import INK, MUTED, PAPER, Colour, instance_colour, text_colour

SCALE = 2
WIDTH = 1200  # nominal pixels, as all lengths below
MARGIN = 56
GAP = 28
RULE: Colour = (228, 228, 231)


class _Page:
    """An image that grows downwards, addressed in nominal pixels."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH * SCALE, 0), PAPER)

    def cut(self, height: float) -> None:
        """Make the page so high; below what was drawn is paper."""
        page = Image.new("RGB", (WIDTH * SCALE, round(height * SCALE)), PAPER)
        page.paste(self.image)
        self.image, self.draw = page, ImageDraw.Draw(page)

    def _reach(self, y: float) -> None:
        """Grow, so that what ends above `y` has room."""
        if y * SCALE > self.image.height:
            self.cut(max(y, 2 * self.image.height / SCALE))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        colour: Colour = INK,
        bold: bool = False,
        anchor: str = "ls",
    ):
        self._reach(y + size)
        font = font_for(text, size * SCALE)
        stroke = size * SCALE / 55 if bold else 0
        self.draw.text((x * SCALE, y * SCALE), text, colour, font, anchor, stroke_width=stroke)

    def rule(self, x0: float, x1: float, y: float):
        self._reach(y + 1)
        self.draw.line((x0 * SCALE, y * SCALE, x1 * SCALE, y * SCALE), fill=RULE, width=SCALE)

    def chip(self, x: float, y: float, text: str, size: float, colour: Colour) -> float:
        """Write `text` on its colour, baseline at `y`; returns the width."""
        self._reach(y + size)
        width = length(text, size) + size * 0.7
        box = (x * SCALE, (y - size * 1.02) * SCALE, (x + width) * SCALE, (y + size * 0.34) * SCALE)
        self.draw.rounded_rectangle(box, radius=size * 0.28 * SCALE, fill=colour)
        self.text(x + size * 0.35, y, text, size, text_colour(colour))
        return width

    def picture(self, x: float, y: float, image: Image.Image):
        """Paste `image`, which is already in device pixels."""
        self._reach(y + image.height / SCALE + 1)
        self.image.paste(image, (round(x * SCALE), round(y * SCALE)))


def length(text: str, size: float) -> float:
    """Width of `text` in nominal pixels."""
    return font_for(text, size * SCALE).getlength(text) / SCALE


def wrap(text: str, size: float, width: float) -> list[list[str]]:
    """Break `text` into lines of words that fit into `width`."""
    lines: list[list[str]] = [[]]
    used = 0.0
    for word in text.split():
        advance = _advance(word, size)
        if lines[-1] and used + advance > width:
            lines.append([])
            used = 0.0
        lines[-1].append(word)
        used += advance
    return lines


def _advance(word: str, size: float) -> float:
    chip = size * 0.7 if _token(word) else 0
    return length(word, size) + chip + length(" ", size)


def _token(word: str) -> re.Match | None:
    return re.fullmatch(r"<asset(\d+)>(\W*)", word)


def draw_sheet(sheet: Sheet) -> Image.Image:
    """Draw title, source, masks, instances, the table of scores, and every picture with boxes and scores."""
    columns = 2 if sheet.few else 3
    page = _Page()
    y = _header(page, sheet)
    y = _source(page, sheet, y, _column(3))
    y = _pictures(page, sheet, y, columns)
    if sheet.footer:
        page.rule(MARGIN, WIDTH - MARGIN, y)
        page.text(MARGIN, y + 28, sheet.footer, 12.5, MUTED)
        y += 36
    page.cut(y + MARGIN - 16)
    return page.image


def _column(columns: int) -> float:
    return (WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns


def _header(page: _Page, sheet: Sheet) -> float:
    page.text(MARGIN, MARGIN + 26, sheet.title, 32, bold=True)
    x: float = MARGIN
    for name, value in sheet.facts.items():
        page.text(x, MARGIN + 58, name, 14.5, MUTED)
        x += length(name, 14.5) + 7
        page.text(x, MARGIN + 58, value, 14.5)
        x += length(value, 14.5) + 24
    return MARGIN + (92 if sheet.facts else 62)


def _section(page: _Page, x: float, y: float, text: str) -> float:
    page.text(x, y + 14, text, 16, bold=True)
    return y + 32


def _source(page: _Page, sheet: Sheet, y: float, column: float) -> float:
    side = round(column * SCALE)
    source = fit(as_image(sheet.source), side, side)
    image_top = _section(page, MARGIN, y, "Learned from one image")
    page.picture(MARGIN, image_top, source)
    second = MARGIN + column + GAP
    _section(page, second, y, "Its instances")
    page.picture(second, image_top, fit(draw_masks(source, sheet.masks), side, side))
    height = source.height / SCALE

    third = second + column + GAP
    for index, (token, mask) in enumerate(zip(sheet.tokens, sheet.masks, strict=True)):
        # The word of an instance stands on the instance itself.
        x0, y0, x1, y1 = mask_box(mask)
        width = length(token, 13) + 13 * 0.7
        x = second + (x0 + x1) / 2 * source.width / SCALE - width / 2
        x = min(max(x, second + 6), second + source.width / SCALE - width - 6)
        page.chip(x, image_top + (y0 + y1) / 2 * height + 5, token, 13, instance_colour(index))
    legend_bottom = _legend(page, sheet, second, image_top + height, column)
    return max(legend_bottom, _score_table(page, sheet, third, y, column)) + 44


def _legend(page: _Page, sheet: Sheet, x: float, y: float, width: float) -> float:
    at, baseline = x, y + 26
    for index, (token, name) in enumerate(zip(sheet.tokens, sheet.class_names, strict=True)):
        if name:
            advance = length(token, 13) + 13 * 0.7 + 6 + length(name, 13)
            if at > x and at + advance > x + width:
                at, baseline = x, baseline + 24
            chip = page.chip(at, baseline, token, 13, instance_colour(index))
            page.text(at + chip + 6, baseline, name, 13)
            at += advance + 16
    return baseline + 8 if any(sheet.class_names) else y


def _score_table(page: _Page, sheet: Sheet, x: float, y: float, width: float) -> float:
    if not sheet.scores:
        return y
    y = _section(page, x, y, "Scores")
    for score in sheet.scores:
        page.rule(x, x + width, y)
        page.text(x, y + 22, LABELS.get(score.metric, score.metric), 15)
        page.text(x, y + 39, EXPLANATIONS.get(score.metric, ""), 12, MUTED)
        page.text(x + width - 20, y + 28, f"{score.value:.3f}", 19, bold=True, anchor="rs")
        page.text(x + width, y + 27, score.arrow, 14, MUTED, anchor="rs")
        y += 50
    page.rule(x, x + width, y)
    page.text(x, y + 20, "↑ higher is better · ↓ lower is better", 11.5, MUTED)
    return y + 24


def _pictures(page: _Page, sheet: Sheet, y: float, columns: int) -> float:
    y = _section(page, MARGIN, y, "Made pictures")
    column = _column(columns)
    side = round(column * SCALE)
    for start in range(0, len(sheet.pictures), columns):
        bottoms = []
        for place, index in enumerate(range(start, min(start + columns, len(sheet.pictures)))):
            x = MARGIN + place * (column + GAP)
            picture = sheet.pictures[index]
            image = as_image(picture.image)
            drawn = fit(draw_layout(picture.boxes, image, side, pixel_ratio=0.75 * SCALE), side, side)
            page.picture(x, y, drawn)
            bottom = _prompt(page, picture, x, y + drawn.height / SCALE + 25, column)
            bottoms.append(_picture_scores(page, sheet.scores_of(index), x, bottom, column))
        y = max(bottoms) + 32
    return y


def _prompt(page: _Page, picture: Picture, x: float, y: float, width: float) -> float:
    size = 14.5
    for line in wrap(picture.prompt, size, width):
        at = x
        for word in line:
            if token := _token(word):
                name = word[: len(word) - len(token[2])]
                chip = page.chip(at, y, name, size, instance_colour(int(token[1])))
                page.text(at + chip, y, token[2], size)
            else:
                page.text(at, y, word, size)
            at += _advance(word, size)
        y += 24
    if picture.seed is not None:
        page.text(x, y - 3, f"seed {picture.seed}", 12.5, MUTED)
        y += 20
    return y


def _picture_scores(page: _Page, scores: dict[str, float], x: float, y: float, width: float) -> float:
    for name, value in scores.items():
        page.text(x, y + 2, LABELS.get(name, name), 12.5, MUTED)
        page.text(x + width, y + 2, f"{value:.3f}", 12.5, anchor="rs")
        y += 19
    return y
