"""One image and a mask per instance, from a folder or drawn by the miniature."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mifo.data.annotations import Annotation
from mifo.data.instance_names import find_source, name_instances
from mifo.data.masks import annotation_mask, box_mask, read_labels, read_mask
from mifo.data.photo_folder import MaskSource, image_file, mask_sources
from mifo.data.pictures import read_picture
from mifo.data.saved_pictures import as_image
from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError
from mifo.world.spec import SceneSpec

# names that the user did not choose: the default, and the one of conf/instances/local.yaml
UNNAMED = (InstancesSettings.name, "local")

_SIDE = 64  # of the grid on which masks are compared with each other and with the picture's border
_DOUBTFUL = 0.6  # a mask that covers more than this share of the picture, or of its border, may be inverted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InstanceSet:
    """One image and its N instances; instance i is `tokens[i]`, `masks[i]`. See also `InstanceNames`."""

    name: str  # of the set, for titles and messages
    image: Tensor  # (3, H, W) uint8, RGB
    masks: Tensor  # (N, H, W) float32 in [0, 1]
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

    A mask over most of the picture or of its border, and two of almost the same place, are warned of.

    Raises:
        MifoError: as `name_instances`; an unreadable image or mask; a mask of several labels, or that is
            empty, nowhere above half or of other proportions than the image.
    """
    names, source = name_instances(settings), find_source(settings)
    if isinstance(source, Path):
        image, masks, sources = _read_folder(source)
    else:
        image, masks = _draw(source)
        sources = [f"thing {i} of the scene {settings.name}" for i in range(len(masks))]
    _refuse_empty(masks, sources, "marks nothing; paint its instance white on black")
    image, masks = _fit(image, masks, settings.fit)
    _refuse_empty(masks, sources, "lies outside the square that is cut out; take instances.fit=squash or pad")
    _warn_of_doubtful(F.interpolate(masks[None], (_SIDE, _SIDE))[0] > 0.5, sources)
    return InstanceSet(_name(settings), image, masks, names.class_names, names.initializers, names.tokens)


def save_side_by_side(sets: Sequence[InstanceSet], folder: Path) -> None:
    """Write the pictures of several sets as one, with the masks of all, into a folder like a user's."""
    height = max(each.image.shape[1] for each in sets)
    images, masks = [], []
    for each in sets:
        below = (0, 0, 0, height - each.image.shape[1])
        images.append(F.pad(each.image, below))
        masks.append(F.pad(each.masks, below))
    widths = [image.shape[2] for image in images]
    as_image(torch.cat(images, 2)).save(folder / "img.png")
    number = 0
    for place, own in enumerate(masks):
        for mask in own:
            around = (sum(widths[:place]), sum(widths[place + 1 :]))
            as_image(F.pad(mask, around)[None]).save(folder / f"mask{number}.png")
            number += 1


def _name(settings: InstancesSettings) -> str:
    """The name that was given, or that of the folder where none was."""
    if settings.folder is None or settings.name not in UNNAMED:
        return settings.name
    # not resolved, since a link has the name that the user chose
    return Path(os.path.abspath(Path(settings.folder).expanduser())).name or settings.name


def _resize(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (N, H, W) at another size (N, *size), bilinear with antialiasing."""
    return F.interpolate(masks[None], size=tuple(size), mode="bilinear", antialias=True)[0].clamp(0, 1)


def _warn_of_doubtful(marked: Tensor, sources: Sequence[str]) -> None:
    """Warn of masks (N, h, w), bool, that hardly tell their instance from the rest."""
    border = torch.ones(_SIDE, _SIDE, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    for mask, source in zip(marked, sources, strict=True):
        share, edge = float(mask.float().mean()), float(mask[border].float().mean())
        if max(share, edge) > _DOUBTFUL:
            log.warning(
                "%s covers %.0f %% of the picture and %.0f %% of its border; is it white on its instance, "
                "not black on white?",
                source,
                100 * share,
                100 * edge,
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


def _draw(spec: SceneSpec) -> tuple[Tensor, Tensor]:
    """Image and masks of a scene of the miniature."""
    # imported here, since only scenes of the miniature need drawing
    from mifo.world.scenes import render_scene

    scene = render_scene(spec)
    return (scene.image * 255).round().byte(), scene.masks.float()


def _read_folder(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Image, masks at its size, and the files of the masks."""
    file = image_file(folder)
    sources = mask_sources(folder)
    pixels = torch.from_numpy(np.array(read_picture(file))).permute(2, 0, 1).contiguous()
    masks = [_read_source(each, pixels.shape[1:]) for each in sources]
    for mask, source in zip(masks, sources, strict=True):
        (height, width), (rows, columns) = pixels.shape[1:], mask.shape
        if not 1 / 1.02 <= (columns / rows) / (width / height) <= 1.02:
            raise MifoError(
                f"{source} is {columns}×{rows}, but {file.name} is displayed at {width}×{height}, so it "
                "would be stretched over other pixels than it marks; save it with the picture's proportions."
            )
    resized = [_resize(torch.from_numpy(mask)[None], pixels.shape[1:])[0] for mask in masks]
    return pixels, torch.stack(resized), [str(each) for each in sources]


def _read_source(source: MaskSource, size: Sequence[int]) -> np.ndarray:
    """(H, W) float32 in [0, 1] of one mask; a box has the picture's `size`."""
    if source.part is None:
        return read_mask(source.file)
    if isinstance(source.part, int):
        return (read_labels(source.file)[0] == source.part).astype(np.float32)
    if isinstance(source.part, Annotation):
        return annotation_mask(source.file, source.part)
    return box_mask(source.part, size)


def _fit(image: Tensor, masks: Tensor, fit: str) -> tuple[Tensor, Tensor]:
    """Make a picture square by cutting or padding; "squash" is left to the resizing."""
    height, width = image.shape[1:]
    if fit == "squash" or height == width:
        return image, masks
    if fit == "pad":
        down, right = max(width - height, 0), max(height - width, 0)
        margins = (right // 2, right - right // 2, down // 2, down - down // 2)
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
