"""What the studio keeps: photos with masks, and the options of the command line that name photos and layouts.

    FOLDER/photos/NAME/         img.jpg, mask0.png, … as `instances.folder` takes them
    FOLDER/instances/NAME.yaml  an option of the group instances, for `--config-dir FOLDER`
    FOLDER/layout/NAME.yaml     an option of the group layout

What is kept is never overwritten: a name that is taken gets a number.
"""

import base64
import binascii
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

from mifo.config.location import conf_folder
from mifo.data.instance_names import instances_in
from mifo.data.instances import InstanceSet, read_instances
from mifo.data.layouts import Layout, LayoutSettings, layouts
from mifo.data.pictures import ENDINGS, read_picture
from mifo.data.saved_pictures import as_image
from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError
from mifo.files import as_record, read_yaml, whole_folder, write_whole

SHOWN = 1024  # pixels of the longer side of a picture in the browser


def options(folder: Path, group: str) -> list[str]:
    """The names of the options that are kept in a group, the newest first."""
    files = sorted((folder / group).glob("*.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [file.stem for file in files]


def keep_photo(
    folder: Path, name: str, photo: Path, names: Sequence[str], masks: Sequence[str | None]
) -> str:
    """Keep a photo with its masks, PNG as data URLs; returns the name of the option of `instances`.

    Raises:
        MifoError: an instance has no mask, some have no name, or `read_instances` refuses what is kept.
    """
    names = [" ".join(each.split()) for each in names]
    for number, (each, mask) in enumerate(zip(names, masks, strict=True), 1):
        if mask is None:
            raise MifoError(f"{each or f'instance {number}'} has no mask; paint it, or remove it.")
    if not masks:
        raise MifoError("there is no instance; add one and paint its mask.")
    if any(names) and not all(names):
        raise MifoError(f"instance {names.index('') + 1} has no name; name all instances, or none.")
    read_picture(photo)  # refuses what is no picture
    suffix = photo.suffix.lower()
    files = {f"img{suffix if suffix in ENDINGS else '.png'}": photo.read_bytes()}
    files |= {f"mask{i}.png": content(mask) for i, mask in enumerate(masks) if mask is not None}
    for taken in _names(name):
        place = folder / "photos" / taken
        option: dict[str, Any] = {"name": taken, "folder": str(place.absolute())}
        option |= {"class_names": names} if any(names) else {}
        free = _is_free(folder, "instances", taken, option)
        if free and not place.exists():
            _text(option)  # refuses names before anything is written
            with whole_folder(place) as unfinished:
                for file, written in files.items():
                    (unfinished / file).write_bytes(written)
                read_instances(InstancesSettings(folder=str(unfinished)))
        elif not free or _files(place) != files:
            continue
        return _keep(folder, "instances", taken, option)
    raise AssertionError  # names have no end


def keep_layout(folder: Path, name: str, layout: LayoutSettings, tokens: Sequence[str]) -> str:
    """Keep a prompt and its boxes; returns the name of the option of `layout`.

    Raises:
        MifoError: see `mifo.data.layouts.layouts`.
    """
    layouts(layout, tokens)
    option = {"prompt": layout.prompt, "boxes": layout.boxes}
    taken = next(taken for taken in _names(name) if _is_free(folder, "layout", taken, option))
    return _keep(folder, "layout", taken, option)


def kept_instances(folder: Path, name: str) -> InstancesSettings:
    """The instances of an option that was kept."""
    return instances_in(_option(folder, "instances", name))


def kept_layout(folder: Path, name: str, tokens: Sequence[str]) -> Layout:
    """The prompt and the boxes of an option that was kept, for the instance `tokens`."""
    path = _option(folder, "layout", name)
    return layouts(as_record(read_yaml(path, from_outside=True), LayoutSettings, path), tokens)[0]


def as_url(picture: Image.Image, form: str = "JPEG") -> str:
    """A picture as a data URL, with at most `SHOWN` pixels on its longer side."""
    small, stream = picture.copy(), BytesIO()
    small.thumbnail((SHOWN, SHOWN))
    small.save(stream, form, quality=90)
    return f"data:image/{form.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def content(url: str) -> bytes:
    """The file in a data URL of the browser."""
    try:
        return base64.b64decode(url.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise MifoError("a picture from the browser is damaged; reload the page and begin again.") from error


def canvas_of(found: InstanceSet) -> dict[str, Any]:
    """What the canvas that paints shows of instances."""
    masks = [as_url(as_image(mask[None]), "PNG") for mask in found.masks]
    names = list(found.class_names or [""] * len(masks))
    return {"picture": as_url(as_image(found.image)), "names": names, "masks": masks}


def labels(found: InstanceSet) -> list[str]:
    """How a prompt in the studio calls each instance: "cat", or "car 1" and "Car 2" where names are equal."""
    names = found.class_names or ("instance",) * len(found.tokens)
    equal = Counter(name.lower() for name in names)  # as a prompt is read
    told: list[str] = []
    for name in names:
        taken = {*equal, *(label.lower() for label in told)}
        numbered = (label for i in count(1) if (label := f"{name} {i}").lower() not in taken)
        told.append(next(numbered) if equal[name.lower()] > 1 else name)
    return told


def with_tokens(prompt: str, told: Sequence[str]) -> str:
    """A prompt with <asset0>, <asset1>, … in place of the labels."""
    tokens = {label.lower(): f"<asset{i}>" for i, label in enumerate(told)}
    known = "|".join(re.escape(label) for label in sorted(tokens, key=len, reverse=True))
    pattern = rf"(?<![\w<])(?:{known})(?![\w>])"
    return re.sub(pattern, lambda match: tokens[match[0].lower()], prompt, flags=re.IGNORECASE)


def with_labels(prompt: str, told: Sequence[str]) -> str:
    """A prompt with the labels in place of <asset0>, <asset1>, …"""
    for i, label in enumerate(told):
        prompt = prompt.replace(f"<asset{i}>", label)
    return prompt


def _option(folder: Path, group: str, name: str) -> Path:
    if name not in options(folder, group):  # which may come from anywhere
        raise MifoError(f"{folder / group} has no {name}; choose one of the list.")
    return folder / group / f"{name}.yaml"


def _names(name: str) -> Iterator[str]:
    """A name as Hydra takes it for an option, then with the numbers from 2 on."""
    plain = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")[:60] or "photo"
    if not isinstance(OverridesParser.create().parse_override(f"name={plain}").value(), str):
        plain = f"my_{plain}"  # a number as 20240101_120000, a truth, or null
    yield plain
    yield from (f"{plain}_{number}" for number in count(2))


def _is_free(folder: Path, group: str, name: str, option: Mapping[str, Any]) -> bool:
    """Whether a name is no option of MIFO's own and not kept with another content."""
    path = folder / group / f"{name}.yaml"
    own = conf_folder() / group / path.name
    return not own.exists() and (not path.exists() or read_yaml(path) == option)


def _text(option: Mapping[str, Any]) -> str:
    text = OmegaConf.to_yaml(OmegaConf.create(dict(option)))
    if "${" in text:
        raise MifoError("${…} is not kept; take it out of names and prompt.")
    return f"# Kept by mifo studio\n{text}"


def _keep(folder: Path, group: str, name: str, option: Mapping[str, Any]) -> str:
    (folder / group).mkdir(parents=True, exist_ok=True)
    write_whole(folder / group / f"{name}.yaml", _text(option))
    return name


def _files(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in place.iterdir()} if place.is_dir() else {}
