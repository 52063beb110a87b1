"""`mifo layout`: the boxes of a layout, drawn without a model."""

import logging
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mifo.config.jobs import claim_folder
from mifo.config.schema import LayoutTaskSettings
from mifo.data.instance_names import name_instances
from mifo.data.layouts import Layout, layouts
from mifo.data.pictures import read_picture
from mifo.errors import MifoError
from mifo.method.regions.boxes import check_boxes
from mifo.report.layout_page import draw_layouts

SHAPES_SIDE = 16  # of the grid on which shapes are found, in Stable Diffusion as in the miniature

log = logging.getLogger(__name__)


def layout(settings: LayoutTaskSettings) -> Path:
    """Draw the boxes with their names over a picture or an empty canvas; returns the drawing's path.

    Layouts of the same boxes are drawn once.
    """
    wanted = layouts(settings.layout, name_instances(settings.instances).tokens)
    picture = _picture(settings.picture) if settings.picture else None
    _warn_of_small_boxes(wanted)
    folder = claim_folder(settings)
    path = folder / "layout.png"
    prompts: dict[tuple, list[str]] = {}
    for each in wanted:
        prompts.setdefault(tuple(each.boxes.items()), []).append(each.prompt)
    draw_layouts([(dict(boxes), told) for boxes, told in prompts.items()], picture).save(path)
    for each in wanted:
        print(each.prompt)
    print(f"layout: {path}")
    return path


def _warn_of_small_boxes(wanted: Sequence[Layout]) -> None:
    """Warn of boxes that sampling will refuse; no error, since another model may have a finer grid."""
    for name, box in dict.fromkeys(item for layout in wanted for item in layout.boxes.items()):
        try:
            check_boxes({name: box}, SHAPES_SIDE)
        except MifoError as error:
            log.warning("%s Stable Diffusion and the miniature cannot sample it.", error)


def _picture(given: str) -> Image.Image:
    try:
        return read_picture(Path(given).expanduser())
    except MifoError as error:
        raise MifoError(f"picture={given}: {error}") from error
