"""Annotations of COCO: which of them are the instances of a picture. Needs no numpy."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mifo.errors import MifoError
from mifo.files import as_record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Annotation:
    """One instance.

    Attributes:
        name: of its category, if that is known.
        size: (height, width) of the annotated picture.
        segmentation: polygons [x0, y0, x1, y1, …], or run lengths {"counts", "size"}; None: the box alone.
        box: [x, y, width, height] in pixels.
    """

    name: str | None
    size: tuple[int, int]
    segmentation: Any
    box: Any


@dataclass(frozen=True)
class _Image:
    id: Any
    height: int
    width: int
    file_name: str = ""


def read_annotations(file: Path, content: dict[str, Any], picture: str) -> list[Annotation]:
    """The annotations of the picture named `picture`, in the order of the file; crowds are left out.

    Raises:
        MifoError: no such picture among several, no annotation of it, or a damaged file.
    """
    lists = {key: content.get(key, []) for key in ("images", "annotations", "categories")}
    for key, rows in lists.items():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise MifoError(f"{file} is damaged: {key} is no list of objects, as COCO has it.")
    images = [
        as_record({key: row[key] for key in row if key in _Image.__annotations__}, _Image, file)
        for row in lists["images"]
    ]
    named = [image for image in images if Path(image.file_name).name.lower() == picture.lower()]
    if len(chosen := named if len(images) > 1 else images) != 1:
        raise MifoError(
            f"{file} has {len(images)} images, of which {len(named)} are named {picture}; keep the "
            "annotated one."
        )
    names = {str(row.get("id")): row.get("name") for row in lists["categories"]}
    if bad := [name for name in names.values() if not isinstance(name, str | type(None))]:
        raise MifoError(f"{file} is damaged: a category is named {bad[0]!r}, which is no text.")
    own = [row for row in lists["annotations"] if row.get("image_id", chosen[0].id) == chosen[0].id]
    if crowds := sum(bool(row.get("iscrowd")) for row in own):
        log.warning("%s: left out %d annotations of crowds, which are no single instance", file, crowds)
    size = (chosen[0].height, chosen[0].width)
    found = [
        Annotation(
            names.get(str(row.get("category_id"))), size, row.get("segmentation") or None, row.get("bbox")
        )
        for row in own
        if not row.get("iscrowd")
    ]
    if not found or min(size) < 1:
        raise MifoError(f"{file} has no annotation of {picture}; annotate an instance at least.")
    return found
