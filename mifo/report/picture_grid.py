"""Pictures side by side, without words around them."""

from collections.abc import Sequence

from PIL import Image

from mifo.data.saved_pictures import Picture, as_image
from mifo.report.drawing import draw_layout


def draw_pictures(
    pictures: Sequence[Picture], columns: int = 4, side: int = 384, gap: int = 12
) -> Image.Image:
    """Draw pictures with their boxes in rows of at most `columns`, each at most `side` pixels long."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + gap) - gap), "white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        drawn = draw_layout(picture.boxes, as_image(picture.image), side)
        grid.paste(drawn, (column * (side + gap), row * (side + gap)))
    return grid
