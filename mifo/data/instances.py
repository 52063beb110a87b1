"""One image and a mask per instance, from a folder or drawn by the miniature."""

import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError

IMAGE_NAMES = ("img.jpg", "img.jpeg", "img.png", "img.webp")
FITS = ("squash", "crop", "pad")

# names that nobody gave: the default, and that of conf/instances/local.yaml
UNNAMED = (InstancesSettings.name, "local")

# Stable Diffusion's picture and latents, the finest on which a mask is learned; the miniature's are smaller
_SIDE, _LATENT_SIDE = 512, 64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InstanceSet:
    """One image and its N instances; instance i is `tokens[i]`, `masks[i]`.

    Attributes:
        name: of the set, for titles and messages.
        image: (3, H, W) uint8, RGB.
        masks: (N, H, W) float32 in [0, 1].
        class_names: N words such as "car", or None where they are not known.
        initializers: per instance the word whose embedding its token starts from, or None for a random start.
        tokens: "<asset0>" … of the N instances.
    """

    name: str
    image: Tensor
    masks: Tensor
    class_names: tuple[str, ...] | None
    initializers: tuple[str | None, ...]
    tokens: tuple[str, ...]

    def resized(self, side: int) -> tuple[Tensor, Tensor]:
        """Image (3, side, side) and masks (N, side, side), float32 in [0, 1]; other shapes are squashed."""
        image = F.interpolate(
            self.image[None].float() / 255, size=(side, side), mode="bicubic", antialias=True
        )
        return image[0].clamp(0, 1), _resize(self.masks, (side, side))


def read_instances(settings: InstancesSettings) -> InstanceSet:
    """Read the image and the masks that `settings` names; cheap, so it also serves as an early check.

    A mask over almost the whole picture, and two of almost the same place, are warned of.

    Raises:
        MifoError: neither or both of folder and scene; a missing or unreadable image or mask, a gap in the
            numbers of the masks; a mask that is empty, nowhere above half, too small to be learned or of
            other proportions than the image; names that do not match the number of masks, or an empty
            initializer.
    """
    if settings.folder is not None and settings.scene is not None:
        raise MifoError(
            f"instances {settings.name} has a scene, so it can not have the folder {settings.folder} too; "
            "for a picture of your own take instances=local instances.folder=PATH."
        )
    if settings.folder is None and settings.scene is None:
        raise MifoError("instances has neither a folder nor a scene; set instances.folder=PATH.")
    if settings.fit not in FITS:
        raise MifoError(f"instances.fit={settings.fit} is not known; take one of {', '.join(FITS)}.")
    if any(word is not None and not word.strip() for word in settings.initializers or ()):
        raise MifoError("instances.initializers holds an empty word; name a word such as 'car', or null.")
    class_names = settings.class_names
    if settings.scene is not None:
        image, masks, drawn = _draw(settings.scene)
        class_names = class_names or drawn
        sources = [f"thing {i} of the scene {settings.name}" for i in range(len(masks))]
    else:
        image, masks, sources = _read_folder(Path(settings.folder).expanduser())
    _refuse_empty(masks, sources, "marks nothing; paint its instance white on black")
    image, masks = _fit(image, masks, settings.fit)
    _refuse_empty(masks, sources, "lies outside the square that is cut out; take instances.fit=squash or pad")
    marked = _on_latents(masks)
    _refuse_empty(
        marked,
        sources,
        f"is too small to be learned, since it marks none of the {_LATENT_SIDE}×{_LATENT_SIDE} latents; "
        "paint more of its instance, or cut the picture closer",
    )
    _warn_of_doubtful(marked, sources)
    return InstanceSet(
        name=_name(settings),
        image=image,
        masks=masks,
        class_names=_one_each("class_names", class_names, masks) if class_names else None,
        initializers=_one_each("initializers", settings.initializers or [None] * len(masks), masks),
        tokens=tuple(f"<asset{i}>" for i in range(len(masks))),
    )


def folder_digest(settings: InstancesSettings) -> str | None:
    """Tell whether a user's folder still holds the same image and masks, whatever its path.

    Returns:
        The first 12 hex digits of SHA-256 over the bytes of the image, mask0.png, mask1.png, … in this order;
        None for a drawn scene of the miniature, which its settings tell.

    Raises:
        MifoError: a missing or unreadable image or mask, or a gap in the numbers of the masks.
    """
    if settings.folder is None:
        return None
    folder = Path(settings.folder).expanduser()
    found = hashlib.sha256()
    for file in (_image_file(folder), *_mask_files(folder)):
        try:
            found.update(file.read_bytes())
        except OSError as error:
            raise MifoError(f"{file} can not be read ({error}); make it readable.") from error
    return found.hexdigest()[:12]


def _name(settings: InstancesSettings) -> str:
    """The name that was given, or that of the folder where none was."""
    if settings.folder is None or settings.name not in UNNAMED:
        return settings.name
    # not resolved, since a link has the name that the user chose
    return Path(os.path.abspath(Path(settings.folder).expanduser())).name or settings.name


def _resize(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (N, H, W) at another size (N, *size), bilinear with antialiasing."""
    return F.interpolate(masks[None], size=tuple(size), mode="bilinear", antialias=True)[0].clamp(0, 1)


def _on_latents(masks: Tensor) -> Tensor:
    """Which latents (N, h, w), bool, the masks (N, H, W) mark, brought to them as learning does it."""
    picture = _resize(masks, (_SIDE, _SIDE))
    return F.interpolate(picture[None], size=(_LATENT_SIDE, _LATENT_SIDE), mode="nearest")[0] > 0.5


def _warn_of_doubtful(marked: Tensor, sources: Sequence[str]) -> None:
    """Warn of masks (N, h, w), bool and not empty, that hardly tell their instance from the rest."""
    for mask, source in zip(marked, sources, strict=True):
        share = float(mask.float().mean())
        if share > 0.9:
            log.warning(
                "%s covers %.0f %% of the picture; is it white on its instance alone?", source, 100 * share
            )
    for (one, first), (other, second) in combinations(zip(marked, sources, strict=True), 2):
        share = float((one & other).sum() / min(one.sum(), other.sum()))
        if share > 0.5:
            log.warning(
                "%s and %s share %.0f %% of the smaller one; are they two instances?",
                first,
                second,
                100 * share,
            )


def _refuse_empty(masks: Tensor, sources: Sequence[str], complaint: str) -> None:
    for mask, source in zip(masks, sources, strict=True):
        if mask.max() == 0:
            raise MifoError(f"{source} {complaint}.")


def _one_each(key: str, values: Sequence[str | None], masks: Tensor) -> tuple[str | None, ...]:
    if len(values) != len(masks):
        raise MifoError(
            f"instances.{key} names {len(values)} instances, but there are {len(masks)} masks; name one each."
        )
    return tuple(values)


def _draw(spec: Mapping[str, Any]) -> tuple[Tensor, Tensor, list[str]]:
    """Image, masks and class names of a scene of the miniature."""
    # imported here, since those who bring a picture need no drawing
    from mifo.world.scenes import SceneSpec, render_scene

    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SceneSpec), spec))
    except OmegaConfBaseException as error:
        raise MifoError(f"instances.scene.{error.full_key}: {str(error).splitlines()[0]}.") from error
    scene = render_scene(typed)
    return (scene.image * 255).round().byte(), scene.masks.float(), scene.class_names


def _read_folder(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Image, masks at its size, and the files of the masks."""
    file = _image_file(folder)
    image = ImageOps.exif_transpose(_open(file))
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip rather than scale
        image = Image.fromarray((_first_channel(image) * 255).round().astype(np.uint8))
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    files = _mask_files(folder)
    masks = [_read_mask(each) for each in files]
    for mask, source in zip(masks, files, strict=True):
        (height, width), (rows, columns) = pixels.shape[1:], mask.shape
        if not 1 / 1.02 <= (columns / rows) / (width / height) <= 1.02:
            raise MifoError(
                f"{source} is {columns}×{rows}, but {file.name} is displayed at {width}×{height}, so it "
                "would be stretched over other pixels than it marks; save it with the picture's proportions."
            )
    resized = [_resize(torch.from_numpy(mask)[None], pixels.shape[1:])[0] for mask in masks]
    return pixels, torch.stack(resized), [str(each) for each in files]


def _image_file(folder: Path) -> Path:
    """The one image of a user's folder."""
    if not folder.is_dir():
        raise MifoError(
            f"instances.folder={folder} is not a folder; name one with img.jpg, mask0.png, mask1.png, …"
        )
    images = [folder / name for name in IMAGE_NAMES if (folder / name).is_file()]
    if len(images) != 1:
        found = " and ".join(file.name for file in images) or "no image"
        raise MifoError(f"{folder} holds {found}; it needs exactly one of {', '.join(IMAGE_NAMES)}.")
    return images[0]


def _mask_files(folder: Path) -> list[Path]:
    """mask0.png, mask1.png, … by number, so that <asset0> is mask0.png."""
    numbered = {}
    for file in sorted(folder.glob("mask*.png")):
        if match := re.fullmatch(r"mask(\d+)\.png", file.name):
            number = int(match[1])
            if number in numbered:
                raise MifoError(
                    f"{file} and {numbered[number].name} are both mask {number}; keep one of them."
                )
            numbered[number] = file
    if not numbered:
        raise MifoError(
            f"{folder} holds no mask; add mask0.png, mask1.png, …, one for each instance, white on black."
        )
    gaps = [number for number in range(max(numbered)) if number not in numbered]
    if gaps:
        raise MifoError(
            f"mask{gaps[0]}.png is missing from {folder}, which holds up to mask{max(numbered)}.png; "
            "number the masks from 0 without gaps."
        )
    return [numbered[number] for number in sorted(numbered)]


def _open(file: Path) -> Image.Image:
    try:
        image = Image.open(file)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MifoError(
            f"{file} can not be read as an image ({error}); save it anew as PNG or JPEG."
        ) from error
    return image


def _read_mask(file: Path) -> np.ndarray:
    """(H, W) float32 in [0, 1] of a mask, white on black or as tools for segmentation write it.

    Alpha that is not opaque everywhere is the mask, as of a cut-out; otherwise the first channel is, as in
    the reference. A grey or palette mask of two values, black and one other, is a label image: the other one,
    be it 1, 100 or dark red, is scaled to 1; so is alpha of two values.
    """
    image = _open(file)
    # Pillow clips 16 bits of grey, whose one transparent level it would then confuse with others
    if image.has_transparency_data and not image.mode.startswith("I"):
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] < 255:
            image = alpha
        elif image.mode == "LA":
            image = image.convert("L")
    colours = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    lit = colours != 0 if colours.ndim == 2 else colours.any(-1)
    if image.mode not in ("RGB", "RGBA") and lit.any() and not lit.all():
        label = colours[lit]
        if (label == label[0]).all():
            return lit.astype(np.float32)
    mask = _first_channel(image)
    if 0 < mask.max() <= 0.5:
        raise MifoError(
            f"{file} reaches {mask.max():.2f} of 1, but an instance is where its mask is above half; paint "
            "it white on black."
        )
    return mask


def _first_channel(image: Image.Image) -> np.ndarray:
    """(H, W) float32 in [0, 1]: the first channel by the range of its format, or by 1 if it holds no more."""
    if image.mode == "P":  # the colours, not their numbers
        image = image.convert("RGB")
    channel = np.asarray(image)
    channel = channel[..., 0] if channel.ndim == 3 else channel
    whole = 1 if channel.max() <= 1 else 65535 if image.mode.startswith("I") else 255
    return channel.astype(np.float32) / whole


def _fit(image: Tensor, masks: Tensor, fit: str) -> tuple[Tensor, Tensor]:
    """Make a picture square by cutting or padding; "squash" is left to the resizing."""
    height, width = image.shape[1:]
    if fit == "squash" or height == width:
        return image, masks
    if fit == "pad":
        total = max(height, width) - torch.tensor([width, height])
        before = total // 2
        left, top = before.tolist()
        right, bottom = (total - before).tolist()
        margins = (left, right, top, bottom)
        padded = F.pad(image[None].float(), margins, mode="replicate")[0].byte()
        return padded, F.pad(masks, margins)
    side = min(height, width)
    marked = masks.amax(0) > 0.5 if (masks > 0.5).any() else masks.amax(0) > 0
    rows, columns = marked.any(1).nonzero(), marked.any(0).nonzero()
    top = _start(rows, side, height)
    left = _start(columns, side, width)
    return image[:, top : top + side, left : left + side], masks[:, top : top + side, left : left + side]


def _start(marked: Tensor, side: int, length: int) -> int:
    """First index of a window of `side` in `length`, with the marked range in its middle where it can."""
    middle = (int(marked.min()) + int(marked.max()) + 1) / 2
    return int(min(max(round(middle - side / 2), 0), length - side))
