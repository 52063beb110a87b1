"""What a mask marks, in every form in which tools for segmentation write it."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mifo.data.annotations import Annotation
from mifo.data.pictures import open_picture
from mifo.errors import MifoError, check_package

# Flat values are looked for on a grid of about this side: soft edges are thinner than three of its cells
_GRID = 128
# A mask of more values than this is soft or a JPEG: values that are close together are then one
_FEW_VALUES = 32
_CLOSE = 0.1  # of the range
_SHARE = 0.01  # of the grid, which a value of a soft mask must fill to be flat

# Channels of a grey, saved as a JPEG, differ by less
_GREY = 16

log = logging.getLogger(__name__)


def read_mask(file: Path) -> np.ndarray:
    """(H, W) float32 in [0, 1] of a mask, white on black or as tools for segmentation write it.

    Alpha that is not opaque everywhere is the mask, as of a cut-out. A mask of two values, black and one
    other, is a label image: the other one, be it 1, 100 or dark red, is scaled to 1. Grey of more values is
    soft, by the range of its format; so is one colour on black, by its strongest channel.

    Raises:
        MifoError: no picture that can be read; several labels; coloured, but not one colour on black; nowhere
            above half.
    """
    levels, whole = _levels(file)
    lit = np.asarray(levels.any(-1))
    if lit.any() and not lit.all() and (levels[lit] == levels[lit][0]).all():
        return lit.astype(np.float32)
    coloured = (np.ptp(levels, -1) > _GREY).sum() > 0.01 * lit.sum()
    if not coloured:
        levels = levels[..., :1]
    flat = _flat_values(levels, whole)
    if len(flat) > 2:
        told = ", ".join(str(value if coloured else value[0]) for value in flat[:4])
        raise MifoError(
            f"{file} has several flat values ({told}{', …' if len(flat) > 4 else ''}), as a label image of "
            "several instances has; save mask0.png, mask1.png, …, one for each instance, white where its "
            "value is and black elsewhere, or take it alone, as labels.png."
        )
    if coloured:
        if len(flat) != 2 or max(flat[0]) > _GREY:
            raise MifoError(
                f"{file} is coloured, but not one colour on black; paint its instance white on black."
            )
        strongest = int(np.argmax(flat[1]))
        return np.minimum(levels[..., strongest].astype(np.float32) / flat[1][strongest], 1)
    mask = levels[..., 0].astype(np.float32) / whole
    if 0 < mask.max() <= 0.5:
        raise MifoError(
            f"{file} reaches {mask.max():.2f} of 1, but an instance is where its mask is above half; paint "
            "it white on black."
        )
    if 0 < mask.max() < 0.9:
        log.warning("%s reaches %.2f of 1 only; is its instance white?", file, mask.max())
    return mask


def label_values(file: Path) -> list[int]:
    """The values of a label image that mark instances, in order: palette indices, grey, or 0xRRGGBB.

    0 is the background, and 255 of indices and grey the void between instances. Values of less than a
    thousandth of the picture are left out; both are warned of.

    Raises:
        MifoError: no picture that can be read, no value, or more than a label image has.
    """
    labels, coloured = read_labels(file)
    values, counts = np.unique(labels, return_counts=True)
    if len(values) > _FEW_VALUES:
        raise MifoError(
            f"{file} has {len(values)} values, so that its edges are smoothed or it is no label image; save "
            "it as PNG with one value for each instance."
        )
    void = {255} if not coloured and len(values) > 2 else set()
    small = {int(v) for v, n in zip(values, counts, strict=True) if v and n < 0.001 * labels.size} - void
    if left_out := sorted((void & {*values.tolist()}) | small):
        log.warning("%s: left out the values %s, void or specks", file, ", ".join(map(str, left_out)))
    found = [int(value) for value in values if value and value not in void | small]
    if not found:
        raise MifoError(f"{file} marks nothing: give each instance a value of its own, 0 for the rest.")
    return found


def read_labels(file: Path) -> tuple[np.ndarray, bool]:
    """The values (H, W) of a label image, and whether they are colours."""
    image = open_picture(file)
    if image.mode in ("1", "L", "P") or image.mode.startswith("I"):
        return np.asarray(image).astype(np.int64), False
    colours = np.asarray(image.convert("RGB")).astype(np.int64)
    return colours @ np.array([1 << 16, 1 << 8, 1]), True


def annotation_mask(file: Path, annotation: Annotation) -> np.ndarray:
    """(H, W) float32 of an annotation of COCO in `file`.

    Raises:
        MifoError: a damaged annotation, or pycocotools is not installed.
    """
    height, width = annotation.size
    found, size = annotation.segmentation, annotation.size
    if found is None:
        if not annotation.box:
            raise MifoError(f"{file} has an annotation with neither a segmentation nor a box; draw one.")
        try:
            left, top, wide, high = map(float, annotation.box)
            edges = (left / width, top / height, (left + wide) / width, (top + high) / height)
            return box_mask([min(max(edge, 0), 1) for edge in edges], size)
        except (TypeError, ValueError, OverflowError) as error:
            raise MifoError(f"{file} has a damaged box ({error}); export it anew.") from error
    check_package(str(file), "pycocotools", "masks")
    from pycocotools import mask as coco

    try:
        if isinstance(found, dict):
            if list(found["size"]) != [height, width]:
                raise ValueError(f"run lengths of {found['size']} in a picture of {[height, width]}")
            counts = found["counts"]
            if isinstance(counts, list):
                if sum(counts) != height * width or min(counts) < 0:
                    raise ValueError("run lengths that do not fill the picture")
                found = coco.frPyObjects(found, height, width)
            runs = found
        else:
            if not all(len(each) >= 6 and len(each) % 2 == 0 for each in found):
                raise ValueError("a polygon of fewer than three points")
            runs = coco.merge(coco.frPyObjects([[float(x) for x in each] for each in found], height, width))
        mask = coco.decode(runs)
        # runs that end too early leave whatever the memory held
        if isinstance(runs["counts"], str) and coco.encode(mask)["counts"].decode() != runs["counts"]:
            raise ValueError("run lengths that do not fill the picture")
        return mask.astype(np.float32)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise MifoError(f"{file} has a damaged segmentation ({error}); export it anew.") from error


def box_mask(box: Sequence[float], size: Sequence[int]) -> np.ndarray:
    """(H, W) float32 of a box [x0, y0, x1, y1] in [0, 1]."""
    height, width = size
    mask = np.zeros((height, width), np.float32)
    x0, y0, x1, y1 = box
    mask[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = 1
    return mask


def _levels(file: Path) -> tuple[np.ndarray, int]:
    """The values (H, W, 1 or 3) that count of a mask, unsigned integers, and the one that means 1."""
    image = open_picture(file)
    deep = image.mode.startswith("I")
    # Pillow clips 16 bits of grey, whose one transparent level it would then confuse with others
    if image.has_transparency_data and not deep:
        alpha = image.convert("RGBA").getchannel("A")
        if any(alpha.histogram()[:255]):
            image = alpha
    if image.mode in ("1", "LA"):
        image = image.convert("L")
    levels = np.asarray(image if image.mode == "L" or deep else image.convert("RGB"))
    levels = levels.reshape(*levels.shape[:2], -1)
    # a mask of zeros and ones is told from a dark one by holding no more
    return levels, 1 if levels.max() <= 1 else 65535 if deep else 255


def _flat_values(levels: np.ndarray, whole: int) -> list[tuple[int, ...]]:
    """The values of `levels` (H, W, C) that fill areas, in order; values of soft edges are none.

    Beside two flat values, one that does not lie between them counts too, such as a border about a label.
    """
    step = max(max(levels.shape[:2]) // _GRID, 1)
    grid = levels[::step, ::step].astype(int)
    rows, columns, _ = grid.shape
    around = [
        grid[y : rows - 2 + y, x : columns - 2 + x] == grid[1:-1, 1:-1] for y in range(3) for x in range(3)
    ]
    inside = grid[1:-1, 1:-1][np.all(around, (0, -1))]
    values = np.unique(grid.reshape(-1, grid.shape[-1]), axis=0)
    flat, sizes = np.unique(inside, axis=0, return_counts=True)
    if len(values) > _FEW_VALUES:
        found: list[np.ndarray] = []
        for value in flat[(sizes >= _SHARE * rows * columns).nonzero()]:
            if all(np.abs(value - other).max() > _CLOSE * whole for other in found):
                found.append(value)
        flat = np.array(found).reshape(-1, grid.shape[-1])
    elif len(flat) == 2:
        margin = _CLOSE * whole
        outside = (values < flat.min(0) - margin) | (values > flat.max(0) + margin)
        flat = np.unique(np.concatenate([flat, values[outside.any(-1)]]), axis=0)
    return sorted(tuple(map(int, value)) for value in flat)
