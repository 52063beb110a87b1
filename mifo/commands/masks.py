"""`mifo masks`: masks of what boxes or clicks point at, or those of a folder, shown over the picture."""

import shlex
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mifo.commands.setup import prepare
from mifo.config.compose import quoted
from mifo.config.jobs import claim_folder
from mifo.config.schema import MasksSettings
from mifo.data.instances import read_instances
from mifo.data.photo_folder import named_boxes
from mifo.data.pictures import read_picture
from mifo.data.saved_pictures import as_image
from mifo.errors import MifoError
from mifo.files import refuse_existing, whole_file, whole_folder
from mifo.making.segmenting import Segmenter, Thing
from mifo.report.masked_picture import draw_masks


def masks(settings: MasksSettings) -> Path:
    """Write `photo/` with picture and masks, unless a folder has them, and `masks.png`, both drawn.

    Returns the drawing's path.

    Raises:
        MifoError: nothing or too much is given, a mask is empty, or the segmenter cannot be had.
    """
    if (settings.picture is None) == (settings.instances is None):
        raise MifoError(
            "mifo masks needs either picture=FILE with boxes or points, or instances=local "
            "instances.folder=FOLDER, whose masks it shows."
        )
    things = _things(settings.boxes, settings.points)
    if settings.instances is not None and things:
        raise MifoError(
            "boxes and points make new masks, but instances has masks already; take picture=FILE instead."
        )
    if settings.picture is not None and not things:
        raise MifoError(
            "picture has no boxes and no points; point at each thing, as 'points={car: [[0.3, 0.5]]}'."
        )
    device = prepare(settings)
    if settings.instances is not None:
        read = read_instances(settings.instances)
        picture, found = as_image(read.image), read.masks
        names: tuple[str, ...] = read.class_names or read.tokens
    else:
        picture = read_picture(Path(settings.picture or "").expanduser())
        segmenter = Segmenter(settings.segmenter, device)
        segmenter.look(picture)
        found = torch.stack([segmenter.mask(thing) for thing in things]).float()
        names = tuple(thing.name for thing in things)
    folder = claim_folder(settings)
    if settings.instances is None:
        _write(folder / "photo", picture, found, names)
    with whole_file(folder / "masks.png") as unfinished:
        draw_masks(picture, found).save(unfinished, "PNG")
    for i, (name, share) in enumerate(zip(names, found.mean((1, 2)).tolist(), strict=True)):
        print(f"<asset{i}>  {name}: {share:.1%} of the picture")
    if settings.instances is None:
        chosen = (
            f"instances.folder={quoted(folder / 'photo')}",
            f"instances.class_names=[{','.join(map(quoted, names))}]",
        )
        print(f"learn: {shlex.join(['mifo', 'run', 'model=sd15', 'instances=local', *chosen])}")
    print(f"masks: {folder / 'masks.png'}")
    return folder / "masks.png"


def _write(folder: Path, picture: Image.Image, found: torch.Tensor, names: tuple[str, ...]) -> None:
    refuse_existing(folder)
    for name, mask in zip(names, found, strict=True):
        if not mask.any():
            raise MifoError(f"the segmenter found nothing for {name}; point at it by other boxes or points.")
    with whole_folder(folder) as unfinished:
        picture.save(unfinished / "img.png")
        for i, mask in enumerate(found):
            as_image(mask[None]).save(unfinished / f"mask{i}.png")


def _things(boxes: dict[str, Any], points: dict[str, Any]) -> list[Thing]:
    """The things of boxes, then those of points alone; points with the name of a box belong to it."""
    found = [Thing(name, box) for name, box in named_boxes("boxes", boxes)] if boxes else []
    names = [thing.name for thing in found]
    for name, given in points.items():
        if names.count(name) > 1 or not isinstance(given, list) or not given:
            raise MifoError(f"points.{name}={given} are no clicks of one thing; write [[x, y], [x, y, 0]].")
        clicks = []
        for point in given:
            if not isinstance(point, list) or len(point) not in (2, 3) or point[2:] not in ([], [0], [1]):
                raise MifoError(f"points.{name} has {point}, which is no click; write [x, y] or [x, y, 0].")
            if not all(type(share) in (int, float) and 0 <= share <= 1 for share in point):
                raise MifoError(
                    f"points.{name} has {point}, which leaves the picture; write shares in [0, 1]."
                )
            clicks.append((float(point[0]), float(point[1]), int([*point, 1][2])))
        if name in names:
            found[names.index(name)] = Thing(name, found[names.index(name)].box, clicks)
        else:
            found.append(Thing(name, None, clicks))
    return found
