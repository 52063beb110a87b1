"""Pictures of the instances' classes, read from files, and the prompts that they are made of."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2.functional import center_crop, resize

from mifo.data.instances import InstanceSet
from mifo.data.pictures import ENDINGS, check_picture, open_picture, read_picture
from mifo.data.settings import PriorSettings
from mifo.errors import MifoError
from mifo.files import existing_folder
from mifo.method.prompts.articles import article

UNKNOWN_CLASS = "thing"
READ_AT_ONCE = 16  # pictures in memory
MOST_CHECKED = 200  # of a folder of more pictures, only the headers are read before learning begins


@dataclass(frozen=True)
class ClassPictures:
    """The middle squares of picture files, each read when it is asked for."""

    files: list[Path]
    side: int

    def read(self, numbers: Sequence[int]) -> Iterator[Tensor]:
        """The pictures of these numbers, (3, side, side) in [0, 1]; one that can not be read is refused."""
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(numbers), READ_AT_ONCE):
                files = [self.files[i] for i in numbers[start : start + READ_AT_ONCE]]
                yield from pool.map(partial(_read, side=self.side), files)


def class_prompts(instances: InstanceSet, settings: PriorSettings) -> list[str]:
    """The prompts of the class pictures: those of the settings, once for every class of the instances.

    Raises:
        MifoError: pictures of one's own for several classes: which of them a picture shows nobody says.
    """
    names = dict.fromkeys(instances.class_names or [UNKNOWN_CLASS])
    classes = [f"{article(name)} {name}" for name in names]
    if settings.folder is not None and len(classes) > 1 and "{class}" in "".join(settings.prompts):
        raise MifoError(
            f"learning.prior.folder={settings.folder} does not say which pictures show "
            f"{' and which '.join(classes)}; give a prompt that fits all of them, such as "
            "learning.prior.prompts=[a photo of an animal], or take null to have them made"
        )
    told = (prompt.replace("{class}", each) for prompt in settings.prompts for each in classes)
    return list(dict.fromkeys(told))


def own_picture_files(given: str) -> list[Path]:
    """The pictures in a folder, of which there must be one at least; refuses one that can not be read."""
    folder = existing_folder("learning.prior.folder", given, "class pictures, or take null to have them made")
    # a hidden file such as macOS's ._cat.jpg is no picture, whatever its ending
    files = sorted(
        file for file in folder.glob("*") if file.suffix.lower() in ENDINGS and not file.name.startswith(".")
    )
    if not files:
        raise MifoError(f"learning.prior.folder={folder} holds no picture; put PNG, JPEG or WebP files there")
    for file in files:
        _check(file, file.lstat().st_mtime_ns, len(files) <= MOST_CHECKED)
    return files


@cache
def _check(file: Path, changed: int, whole: bool) -> None:
    """Refuse a picture that can not be read; a file is checked again only after it has changed."""
    (open_picture if whole else check_picture)(file)


def _read(file: Path, side: int) -> Tensor:
    """(3, side, side) in [0, 1], the middle square of the picture."""
    image = pil_to_tensor(read_picture(file)).float() / 255
    return center_crop(resize(image, [side], antialias=True), [side, side]).clamp(0, 1)
