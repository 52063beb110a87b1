"""Which files of a user's folder are the image and its masks; none that looks like a mask is left out."""

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from mifo.data.annotations import Annotation, read_annotations
from mifo.data.pictures import ENDINGS, MOST_BYTES
from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError
from mifo.files import existing_folder, read_json, read_yaml, regular_file
from mifo.method.regions.boxes import check_boxes

IMAGE_NAMES = tuple(f"img{ending}" for ending in ENDINGS)

_MASK = re.compile(r"mask[ _-]?([0-9]+)\.(png|jpe?g|webp)", re.IGNORECASE)
LABELS = ("instances", "label", "labels", "masks", "segmentation")  # names of label images
_OTHER_ENDINGS = (".avif", ".bmp", ".dds", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".tga", ".tif", ".tiff")


log = logging.getLogger(__name__)


def image_file(folder: Path) -> Path:
    """The one image of a user's folder: img.jpg, IMG.PNG, …

    Raises:
        MifoError: no folder; no image, one of another format, or several.
    """
    pictures = _pictures(folder)
    images = [file for file in pictures if file.stem.lower() == "img"]
    if len(images) != 1:
        found = " and ".join(file.name for file in images) or "no image"
        others = [file for file in pictures if "mask" not in file.stem.lower()]
        hint = f"; rename {others[0].name}" if len(others) == 1 and not images else ""
        raise MifoError(f"{folder} holds {found}; it needs exactly one of {', '.join(IMAGE_NAMES)}{hint}.")
    if images[0].suffix.lower() not in ENDINGS:
        raise MifoError(f"{images[0]} is not read, since of its format; save it as PNG, JPEG or WebP.")
    return images[0]


@dataclass(frozen=True)
class MaskSource:
    """Where the mask of one instance is.

    Attributes:
        name: of the instance's class, if the file tells it.
        part: of a file with several masks the one that is meant: the value of a label image, an annotation
            of COCO, a box; None: the file is one mask.
    """

    file: Path
    name: str | None = None
    part: int | Annotation | tuple[float, ...] | None = None

    def __str__(self) -> str:
        told = self.part if isinstance(self.part, int) else self.name
        return f"{self.file}" if self.part is None else f"{self.file} ({told})"


def mask_sources(folder: Path) -> list[MaskSource]:
    """The masks of a user's folder, <asset0>'s first, in one of these forms:

    mask0.png, mask1.png, … by number (MASK_0.PNG and mask-0.jpg are too); a label image such as labels.png by
    its values; a JSON file of COCO by its annotations; boxes.yaml or boxes.json by its entries; car.png,
    mug.png, … by name, where there is none of the others. What is left out is warned of.

    Raises:
        MifoError: no mask, masks in several forms, a number that is missing or twice there, a file whose name
            is not understood though it has "mask" in it, or a damaged file.
    """
    pictures = [file for file in _pictures(folder) if file.stem.lower() != "img"]
    labels = [file for file in pictures if file.stem.lower() in LABELS and file.suffix.lower() in ENDINGS]
    numbered = _numbered(folder, [file for file in pictures if file not in labels])
    records = _records(folder)
    forms = [*([numbered[0]] if numbered else []), *labels, *records]
    if len(forms) > 1:
        raise MifoError(
            f"{folder} holds masks in several forms ({', '.join(file.name for file in forms)}); keep one."
        )
    others = [file for file in pictures if file not in (*numbered, *labels)]
    named = [] if forms else [file for file in others if file.suffix.lower() in (".png", ".webp")]
    if left_out := [file.name for file in others if file not in named]:
        log.warning("%s: left out, since no mask by their names: %s", folder, ", ".join(left_out))
    if labels:
        # imported here, since it needs numpy
        from mifo.data.masks import label_values

        return [MaskSource(labels[0], None, value) for value in label_values(labels[0])]
    if records:
        (file, content), *_ = records.items()
        if isinstance(content, dict) and "annotations" in content:
            annotations = read_annotations(file, content, image_file(folder).name)
            return [MaskSource(file, each.name, each) for each in annotations]
        return [MaskSource(file, name, box) for name, box in named_boxes(file, content)]
    found = [MaskSource(file) for file in numbered] or [MaskSource(file, _class(file)) for file in named]
    if not found:
        raise MifoError(
            f"{folder} holds no mask; add mask0.png, mask1.png, …, one for each instance, white on black."
        )
    return found


def _class(file: Path) -> str:
    """The class that a file's name tells: car_1.png is a car."""
    return re.sub(r"[ _-]*[0-9]*$", "", file.stem).replace("_", " ") or file.stem


def _numbered(folder: Path, pictures: Sequence[Path]) -> list[Path]:
    """The files whose names have the numbers from 0 on."""
    numbered: dict[int, Path] = {}
    left_out = []
    for file in pictures:
        if match := _MASK.fullmatch(file.name):
            number = int(match[1])
            if number in numbered:
                raise MifoError(
                    f"{file} and {numbered[number].name} are both mask {number}; keep one of them."
                )
            numbered[number] = file
        elif "mask" in file.stem.lower():
            left_out.append(file)
    free = next(number for number in count() if number not in numbered)
    if left_out:
        raise MifoError(
            f"{left_out[0]} looks like a mask, but would not be read: save it as mask{free}.png if it is "
            "one, else move it elsewhere."
        )
    if free < len(numbered):
        raise MifoError(
            f"mask{free}.png is missing from {folder}, which holds up to {numbered[max(numbered)].name}; "
            "number the masks from 0 without gaps."
        )
    return [numbered[number] for number in sorted(numbered)]


def named_boxes(file: Path | str, content: Any) -> list[tuple[str, tuple[float, ...]]]:
    """Names and boxes [x0, y0, x1, y1] in [0, 1]; a name may have several. `file` is for the messages.

    Raises:
        MifoError: what is no box, or an impossible one.
    """
    if not isinstance(content, dict) or not content:
        raise MifoError(f"{file} holds no boxes; write a name and its box, as car: [0.1, 0.2, 0.5, 0.9].")
    found = []
    for name, given in content.items():
        several = isinstance(given, list) and given and all(isinstance(each, list) for each in given)
        for box in given if several else [given]:
            if not isinstance(box, list) or not all(type(edge) in (int, float) for edge in box):
                raise MifoError(f"{file}: {name} has {box}, which is no box; write [x0, y0, x1, y1].")
            check_boxes({str(name): box})
            found.append((str(name), tuple(box)))
    return found


def _records(folder: Path) -> dict[Path, Any]:
    """What the files of annotations and boxes hold: boxes.yaml, boxes.json, and COCO's JSON of any name."""
    found = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or not file.is_file():
            continue
        if file.name.lower() in ("boxes.yaml", "boxes.yml"):
            found[file] = read_yaml(file)
        elif file.suffix.lower() == ".json":
            content = read_json(file)
            if file.stem.lower() == "boxes" or (isinstance(content, dict) and "annotations" in content):
                found[file] = content
    return found


def folder_digest(settings: InstancesSettings) -> str | None:
    """Tell whether a user's folder still holds the same image and masks, whatever its path.

    Returns:
        The first 12 hex digits of SHA-256 over the bytes of the image, mask 0, mask 1, … in this order;
        None for a drawn scene of the miniature, which its settings tell.

    Raises:
        MifoError: a missing or unreadable image or mask, or a gap in the numbers of the masks.
    """
    if settings.folder is None:
        return None
    folder = Path(settings.folder).expanduser()
    found = hashlib.sha256()
    masks = dict.fromkeys(source.file for source in mask_sources(folder))
    for file in (image_file(folder), *masks):
        with regular_file(file, MOST_BYTES) as stream:
            found.update(stream.read())
    return found.hexdigest()[:12]


def _pictures(folder: Path) -> list[Path]:
    """The files of a folder that are pictures by their names, sorted; hidden ones are those of systems."""
    folder = existing_folder("instances.folder", folder, "img.jpg, mask0.png, mask1.png, …")
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise MifoError(f"{folder} can not be read ({error.strerror}); make it readable.") from error
    endings = (*ENDINGS, *_OTHER_ENDINGS)
    return [file for file in files if file.suffix.lower() in endings and not file.name.startswith(".")]
