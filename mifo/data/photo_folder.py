"""Which files of a user's folder are the image and its masks; none that looks like a mask is left out."""

import hashlib
import re
from itertools import count
from pathlib import Path

from mifo.data.pictures import ENDINGS, MOST_BYTES
from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError
from mifo.files import existing_folder, regular_file

IMAGE_NAMES = tuple(f"img{ending}" for ending in ENDINGS)

_MASK = re.compile(r"mask[ _-]?([0-9]+)\.(png|jpe?g|webp)", re.IGNORECASE)
_OTHER_ENDINGS = (".avif", ".bmp", ".dds", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".tga", ".tif", ".tiff")


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


def mask_files(folder: Path) -> list[Path]:
    """mask0.png, mask1.png, … by number, so that <asset0> is mask0.png; MASK_0.PNG and mask-0.jpg are too.

    Raises:
        MifoError: no mask, a number that is missing or twice there, or a file whose name is not understood
            though it has "mask" in it.
    """
    numbered: dict[int, Path] = {}
    left_out = []
    for file in _pictures(folder):
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
    if not numbered:
        raise MifoError(
            f"{folder} holds no mask; add mask0.png, mask1.png, …, one for each instance, white on black."
        )
    if free < len(numbered):
        raise MifoError(
            f"mask{free}.png is missing from {folder}, which holds up to {numbered[max(numbered)].name}; "
            "number the masks from 0 without gaps."
        )
    return [numbered[number] for number in sorted(numbered)]


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
    for file in (image_file(folder), *mask_files(folder)):
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
