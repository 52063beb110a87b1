"""`mifo layout`: what a layout asks for, drawn before any model is loaded."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from mifo.config.jobs import claim_folder
from mifo.config.layouts import layouts
from mifo.config.schema import LayoutTaskSettings
from mifo.data.instances import read_instances
from mifo.errors import MifoError
from mifo.report.drawing import draw_layout


def layout(settings: LayoutTaskSettings) -> Path:
    """Draw the boxes with their names over a picture or an empty canvas; returns the drawing's path."""
    wanted = layouts(settings.layout, read_instances(settings.instances).tokens)
    picture = _picture(settings.picture)
    folder = claim_folder(settings)
    path = folder / "layout.png"
    draw_layout(wanted[0].boxes, picture).save(path)
    for each in wanted:
        print(each.prompt)
    print(f"layout: {path}")
    return path


def _picture(source: str | None) -> Image.Image | None:
    try:
        return source and Image.open(source).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise MifoError(f"picture={source} cannot be read as an image; give a PNG, JPEG or WebP") from error
