"""One image and a mask per instance, from a folder or drawn by the miniature."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class InstanceSet:
    """One image and its N instances; instance i is `tokens[i]`, `masks[i]`.

    Attributes:
        name: of the set, for folders and logs.
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
        masks = F.interpolate(self.masks[None], size=(side, side), mode="bilinear", antialias=True)
        return image[0].clamp(0, 1), masks[0].clamp(0, 1)


def read_instances(settings: InstancesSettings) -> InstanceSet:
    """Read the image and the masks that `settings` names; cheap, so it also serves as an early check.

    Raises:
        MifoError: neither or both of folder and scene; a missing or unreadable image or mask, a gap in the
            numbers of the masks, an empty mask; names that do not match the number of masks.
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
    return InstanceSet(
        name=settings.name,
        image=image,
        masks=masks,
        class_names=_one_each("class_names", class_names, masks) if class_names else None,
        initializers=_one_each("initializers", settings.initializers or [None] * len(masks), masks),
        tokens=tuple(f"<asset{i}>" for i in range(len(masks))),
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
    from mifo.miniature.scenes import SceneSpec, render_scene

    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SceneSpec), spec))
    except OmegaConfBaseException as error:
        raise MifoError(f"instances.scene.{error.full_key}: {str(error).splitlines()[0]}.") from error
    scene = render_scene(typed)
    return (scene.image * 255).round().byte(), scene.masks.float(), scene.class_names


def _read_folder(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Image, masks at its size, and the files of the masks."""
    if not folder.is_dir():
        raise MifoError(
            f"instances.folder={folder} is not a folder; name one with img.jpg, mask0.png, mask1.png, …"
        )
    images = [folder / name for name in IMAGE_NAMES if (folder / name).is_file()]
    if len(images) != 1:
        found = " and ".join(file.name for file in images) or "no image"
        raise MifoError(f"{folder} holds {found}; it needs exactly one of {', '.join(IMAGE_NAMES)}.")
    image = ImageOps.exif_transpose(_open(images[0]))
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip rather than scale
        image = Image.fromarray((_first_channel(image) * 255).round().astype(np.uint8))
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    files = _mask_files(folder)
    masks = [torch.from_numpy(_first_channel(_open(file))) for file in files]
    resized = [
        F.interpolate(mask[None, None], size=pixels.shape[1:], mode="bilinear", antialias=True)[0, 0].clamp(
            0, 1
        )
        for mask in masks
    ]
    return pixels, torch.stack(resized), [str(file) for file in files]


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
