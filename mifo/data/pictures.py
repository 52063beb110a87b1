"""The one reader of pictures from outside: it gives a picture as a viewer shows it.

Photographs, masks, class pictures and saved pictures are all read here. A link to a picture is followed,
since a user's folder may be made of links, and nothing but pixels is taken from its end.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import chain, product
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError

from mifo.errors import MifoError
from mifo.files import regular_file

FORMATS = ("PNG", "JPEG", "WEBP")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")

MOST_BYTES = 512 * 2**20
MOST_MEGAPIXELS = 89  # Pillow warns beyond them and refuses twice as many

# mode in which Pillow holds the colours that a profile describes
_PROFILE_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}
_SRGB = ImageCms.createProfile("sRGB")
# a profile that moves no colour by more than this many levels of 255 counts as sRGB
_SAME_COLOUR = 2

log = logging.getLogger(__name__)

# of large pictures, refused below, and of oddities in EXIF that do not concern the picture
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_picture(file: Path) -> Image.Image:
    """A picture as RGB in sRGB, upright, over white where it is transparent.

    Of several frames the first is taken. Frames that are left out, transparent pixels and a colour profile
    that can not be used are warned of.

    Raises:
        MifoError: see `open_picture`.
    """
    image = open_picture(file)
    profile = image.info.get("icc_profile")
    with _refusing(file):
        image = _in_eight_bits(image)
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        kind = {"1": "L", "LA": "L"}.get(image.mode, image.mode)
        shown = _in_srgb(image.convert(kind if kind in ("L", "CMYK") else "RGB"), profile, file)
    if alpha is None or alpha.getextrema()[0] == 255:
        return shown
    share = 1 - alpha.histogram()[255] / (alpha.width * alpha.height)
    log.warning("%s is transparent in %.1f %% of its pixels, which are read over white", file, 100 * share)
    canvas = Image.new("RGB", shown.size, "white")
    canvas.paste(shown, mask=alpha)
    return canvas


def open_picture(file: Path) -> Image.Image:
    """The first frame of a PNG, JPEG or WebP file as it is stored, turned upright.

    Raises:
        MifoError: no regular file, another format, more pixels than are read, or damaged.
    """
    with regular_file(file, MOST_BYTES) as stream, _refusing(file):
        image = _identified(stream)
        if image.format == "PNG":
            image.verify()  # checksums, which the decoder passes over; JPEG and WebP have none
            stream.seek(0)
            image = _identified(stream)
        # a JPEG of several pictures (MPO) holds previews or a depth map beside the photograph
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        image.load()
        image = ImageOps.exif_transpose(image)
    if frames > 1:
        log.warning("%s holds %d frames, of which the first is read", file, frames)
    return image


def check_picture(file: Path) -> None:
    """Refuse a file that `open_picture` would refuse by its header, which alone is read."""
    with regular_file(file, MOST_BYTES) as stream, _refusing(file):
        _identified(stream)


def is_whole(file: Path, side: int) -> bool:
    """Whether a PNG written by MIFO exists, is `side` pixels wide and high, and is undamaged."""
    try:
        with regular_file(file, MOST_BYTES) as stream, _refusing(file):
            image = Image.open(stream, formats=["PNG"])
            size = image.size
            image.verify()  # checksums, without decoding
    except MifoError:
        return False
    return size == (side, side)


def _identified(stream: BinaryIO) -> Image.Image:
    """A picture whose header is read but not its pixels, unless it has too many of them."""
    image = Image.open(stream, formats=FORMATS)
    if image.width * image.height > MOST_MEGAPIXELS * 10**6:
        raise Image.DecompressionBombError
    return image


@contextmanager
def _refusing(file: Path) -> Iterator[None]:
    """Turn whatever Pillow raises into one sentence.

    Damaged files raise from deep inside its decoders: SyntaxError, struct.error, OverflowError, KeyError, …
    """
    try:
        yield
    except Image.DecompressionBombError as error:
        raise MifoError(f"{file} has more than {MOST_MEGAPIXELS} megapixels; make it smaller") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "it is of another format, or damaged"
        raise MifoError(
            f"{file} can not be read as PNG, JPEG or WebP ({reason}); save it anew as one of them"
        ) from error


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, which Pillow would clip, scaled to 8; other pictures as they are."""
    if not image.mode.startswith("I"):
        return image
    import numpy as np  # imported here, since few pictures have 16 bits

    levels = np.asarray(image)
    grey = Image.fromarray((levels.astype(np.float32) / 65535 * 255).round().astype(np.uint8))
    if (hidden := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(levels == hidden, 0, 255).astype(np.uint8)))
    return grey


def _in_srgb(colours: Image.Image, profile: bytes | None, file: Path) -> Image.Image:
    """Colours, grey, RGB or CMYK, in RGB, converted from the profile that the file carries."""
    if not profile:
        return colours.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = _PROFILE_MODES.get(source.profile.xcolor_space.strip())
        if mode == "RGB" and colours.mode == "L":
            colours = colours.convert("RGB")
        if mode != colours.mode:
            raise ValueError(f"it is not for {colours.mode}")
        to_srgb = ImageCms.buildTransform(source, _SRGB, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        log.warning("%s has a colour profile that can not be used (%s), and is read as sRGB", file, error)
        return colours.convert("RGB")
    if mode == "RGB":
        samples = _samples()
        moved = ImageChops.difference(_transformed(samples, to_srgb), samples)
        if not any(any(band.histogram()[_SAME_COLOUR + 1 :]) for band in moved.split()):
            return colours
    return _transformed(colours, to_srgb)


def _transformed(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    moved = ImageCms.applyTransform(image, transform)
    assert moved is not None  # it is None only where the image itself is changed
    return moved


def _samples() -> Image.Image:
    """Nine levels of every channel with all others."""
    levels = [round(255 * step / 8) for step in range(9)]
    return Image.frombytes("RGB", (27, 27), bytes(chain.from_iterable(product(levels, repeat=3))))
