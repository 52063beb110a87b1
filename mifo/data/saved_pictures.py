"""A made picture with what it was made from, and folders of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from mifo.errors import MifoError
from mifo.files import write_whole


@dataclass(frozen=True)
class Picture:
    """One picture: `image` is float (3, H, W) in [0, 1].

    `boxes` maps an instance token, or words of the prompt, to [x0, y0, x1, y1] in [0, 1].
    """

    image: Tensor
    prompt: str
    boxes: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)
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
        as_image(picture.image).save(folder / name)
        rows.append({"file": name, "prompt": picture.prompt, "boxes": picture.boxes, "seed": picture.seed})
    # last and at once: where it lies, all pictures do
    write_whole(folder / "pictures.json", json.dumps(rows, indent=2) + "\n")
    return folder


def read_pictures(folder: Path | str) -> list[Picture]:
    """Read what `save_pictures` wrote. Raises MifoError when the list or a picture cannot be read."""
    listing = Path(folder) / "pictures.json"
    try:
        rows = json.loads(listing.read_text())
        return [
            Picture(
                pil_to_tensor(Image.open(listing.parent / row["file"]).convert("RGB")) / 255,
                row["prompt"],
                {name: tuple(box) for name, box in row["boxes"].items()},
                row["seed"],
            )
            for row in rows
        ]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MifoError(
            f"{error.filename} does not exist: give a folder made by `mifo synthesize`."
        ) from error
    except (ValueError, KeyError, TypeError, UnidentifiedImageError) as error:
        raise MifoError(
            f"{listing} cannot be read: make the pictures again with `mifo synthesize`."
        ) from error
