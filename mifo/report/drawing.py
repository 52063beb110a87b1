"""Pictures with boxes drawn over them, and the text tools of everything drawn. Needs no torch."""

from collections.abc import Mapping, Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from mifo.report.palette import Colour, name_colours, text_colour

Box = Sequence[float]
CANVAS: Colour = (247, 247, 248)
GRID: Colour = (226, 226, 230)


@cache
def _font(size: float, ascii_only: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # Pillow's own face has no letters beyond ASCII; matplotlib's has.
    if ascii_only:
        return ImageFont.load_default(size)
    import matplotlib  # imported here, since most texts need none of it

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size * 0.92)


def font_for(text: str, size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return a font of `size` pixels that has every letter of `text`."""
    return _font(size, text.isascii())


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize `image` as large as it fits into width × height."""
    scale = min(width / image.width, height / image.height)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def draw_layout(
    boxes: Mapping[str, Box],
    picture: Image.Image | None = None,
    size: int = 768,
    pixel_ratio: float = 1,
    labels: bool = True,
) -> Image.Image:
    """Draw named boxes [x0, y0, x1, y1] in [0, 1] over a picture, or over an empty square canvas.

    Args:
        boxes: box of each name, in the order they are drawn; `<asset3>` has the colour of instance 3.
        picture: what to draw over, resized to `size` on its longer side.
        size: longer side of the result in pixels.
        pixel_ratio: lines and labels are this many times as large; 2 for dense screens.
        labels: whether each box bears its name.
    """
    image = _empty_canvas(size) if picture is None else fit(picture.convert("RGB"), size, size)
    colours = name_colours(boxes)
    width = round(3 * pixel_ratio)
    edges = {name: _pixels(box, image.size) for name, box in boxes.items()}

    tint = Image.new("RGBA", image.size)
    if picture is None:
        for name, edge in edges.items():
            fill = Image.new("RGBA", image.size)
            ImageDraw.Draw(fill).rectangle(edge, fill=(*colours[name], 42))
            tint = Image.alpha_composite(tint, fill)
    image = Image.alpha_composite(image.convert("RGBA"), tint).convert("RGB")

    draw = ImageDraw.Draw(image)
    for name, (left, top, right, bottom) in edges.items():
        halo = width + round(pixel_ratio)  # a white rim keeps the line visible on any picture
        draw.rectangle((left, top, right, bottom), outline=(255, 255, 255), width=halo)
        draw.rectangle((left, top, right, bottom), outline=colours[name], width=width)
    placed: list[tuple[int, int, int, int]] = []
    for name, edge in edges.items() if labels else ():
        placed.append(_draw_label(draw, name, edge, colours[name], 17 * pixel_ratio, image.size, placed))
    return image


def _empty_canvas(size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), CANVAS)
    draw = ImageDraw.Draw(image)
    for step in range(1, 8):
        place = round(size * step / 8)
        draw.line((place, 0, place, size), fill=GRID, width=1)
        draw.line((0, place, size, place), fill=GRID, width=1)
    draw.rectangle((0, 0, size - 1, size - 1), outline=GRID, width=2)
    return image


def _pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(edge * side) for edge, side in zip(box, 2 * size, strict=True))
    return left, top, right - 1, bottom - 1


def _draw_label(
    draw: ImageDraw.ImageDraw,
    name: str,
    edge: tuple[int, int, int, int],
    colour: Colour,
    font_size: float,
    size: tuple[int, int],
    placed: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """Write `name` at a corner of the box, inside where there is room, else above, clear of other labels."""
    font = font_for(name, font_size)
    pad_x, pad_y = round(font_size * 0.45), round(font_size * 0.28)
    width = round(font.getlength(name)) + 2 * pad_x
    height = round(font_size) + 2 * pad_y
    left, top, right, bottom = edge
    roomy = right - left >= width and bottom - top >= 2.5 * height
    inside = [(left, top), (right - width + 1, top), (left, bottom - height + 1)]
    outside = [(left, top - height), (left, bottom + 1)]
    places = [
        (min(max(x, 0), size[0] - width), min(max(y, 0), size[1] - height))
        for x, y in (inside + outside if roomy else outside + inside)
    ]
    rectangles = [(x, y, x + width - 1, y + height - 1) for x, y in places]
    free = (rectangle for rectangle in rectangles if not any(_overlap(rectangle, other) for other in placed))
    chosen = next(free, rectangles[0])
    draw.rounded_rectangle(chosen, radius=round(font_size * 0.2), fill=colour)
    middle = ((chosen[0] + chosen[2]) / 2, (chosen[1] + chosen[3]) / 2 + font_size * 0.02)
    draw.text(middle, name, font=font, fill=text_colour(colour), anchor="mm")
    return chosen


def _overlap(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> bool:
    return first[0] <= second[2] and second[0] <= first[2] and first[1] <= second[3] and second[1] <= first[3]
