"""A made picture with what it was made from, and folders of them."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from mifo.data.layouts import Boxes
from mifo.data.pictures import read_picture
from mifo.errors import MifoError
from mifo.files import as_record, read_json, whole_file, write_whole
from mifo.method.regions.boxes import check_boxes


@dataclass(frozen=True)
class Picture:
    """One picture: `image` is float (3, H, W) in [0, 1].

    `boxes` maps an instance token, or words of the prompt, to [x0, y0, x1, y1] in [0, 1].
    """

    image: Tensor
    prompt: str
    boxes: Boxes = field(default_factory=dict)
    seed: int | None = None


def as_image(picture: Tensor) -> Image.Image:
    """Turn (3, H, W), uint8 or float in [0, 1], into an RGB image; floats are rounded, not cut."""
    picture = picture.detach().cpu()
    if picture.is_floating_point():
        picture = (picture.float().clamp(0, 1) * 255).round().byte()
    return to_pil_image(picture)


def save_pictures(folder: Path | str, pictures: Sequence[Picture]) -> Path:
    """Write `000.png` … and `pictures.json` (prompt, boxes and seed of each) into a new or empty `folder`."""
    folder = Path(folder)
    if (folder / "pictures.json").exists():
        raise MifoError(f"{folder} already holds pictures: choose another output folder.")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, picture in enumerate(pictures):
        name = f"{index:03d}.png"
        with whole_file(folder / name) as unfinished:
            as_image(picture.image).save(unfinished, "PNG")
        rows.append({"file": name, "prompt": picture.prompt, "boxes": picture.boxes, "seed": picture.seed})
    # written last: where this file exists, all pictures do
    write_whole(folder / "pictures.json", json.dumps(rows, indent=2) + "\n")
    return folder


@dataclass(frozen=True)
class _Row:
    """One picture in `pictures.json`."""

    file: str
    prompt: str
    boxes: dict[str, list[float]]
    seed: int | None


def read_pictures(folder: Path | str) -> list[Picture]:
    """Read what `save_pictures` wrote.

    Raises:
        MifoError: the list or a picture is missing or damaged, or the list names a file outside `folder`.
    """
    folder = Path(folder)
    listing = folder / "pictures.json"
    if not os.path.lexists(listing):
        raise MifoError(f"{listing} does not exist: give a folder made by `mifo synthesize`.")
    rows = read_json(listing)
    if not isinstance(rows, list):
        raise MifoError(f"{listing} is damaged: it holds no list")
    return [_picture(folder, as_record(row, _Row, listing)) for row in rows]


def _picture(folder: Path, row: _Row) -> Picture:
    file = folder / row.file
    # a folder from a stranger must not show other files of this machine
    if row.file != file.name or os.path.islink(file):
        raise MifoError(f"{folder / 'pictures.json'} names {row.file[:80]!r}, which is no file beside it.")
    try:
        check_boxes(row.boxes)
    except MifoError as error:
        raise MifoError(f"{folder / 'pictures.json'} is damaged: {error}") from error
    image = pil_to_tensor(read_picture(file)) / 255
    boxes = {name: (x0, y0, x1, y1) for name, (x0, y0, x1, y1) in row.boxes.items()}
    return Picture(image, row.prompt, boxes, row.seed)
