"""Pictures of the instances' classes, so that learning keeps the class (DreamBooth, arXiv 2208.12242)."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import torch
from rich.progress import Progress
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.transforms.v2.functional import center_crop, resize

from mifo.data.instances import InstanceSet
from mifo.data.pictures import ENDINGS, check_picture, is_whole, read_picture
from mifo.diffusion.noise_schedule import NoiseSchedule
from mifo.errors import MifoError
from mifo.files import existing_folder
from mifo.guidance.settings import GuidanceSettings
from mifo.learning.settings import PriorSettings
from mifo.models.images import decode_latents
from mifo.models.loading import DiffusionModel
from mifo.models.text import encode_prompts
from mifo.performance.settings import PerformanceSettings
from mifo.prompts.articles import article
from mifo.synthesis.sampler import KeptPasses, synthesize
from mifo.synthesis.settings import SynthesisSettings

UNKNOWN_CLASS = "thing"
READ_AT_ONCE = 16  # pictures in memory


@dataclass(frozen=True)
class ClassPictures:
    """Class pictures (3, H, W) in [0, 1], the middle squares of these files; read as they are taken.

    Raises:
        MifoError: when pictures are taken: one can not be read.
    """

    files: list[Path]
    side: int

    def read(self, numbers: Sequence[int]) -> Iterator[Tensor]:
        """The pictures of these numbers only."""
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(numbers), READ_AT_ONCE):
                files = [self.files[i] for i in numbers[start : start + READ_AT_ONCE]]
                yield from pool.map(partial(_read, side=self.side), files)


def class_prompts(instances: InstanceSet, settings: PriorSettings) -> list[str]:
    """The prompts of the class pictures: those of the settings, once for every class of the instances."""
    names = dict.fromkeys(instances.class_names or [UNKNOWN_CLASS])
    classes = [f"{article(name)} {name}" for name in names]
    told = (prompt.replace("{class}", each) for prompt in settings.prompts for each in classes)
    return list(dict.fromkeys(told))


def class_pictures(
    model: DiffusionModel,
    prompts: list[str],
    settings: PriorSettings,
    seed: int,
    performance: PerformanceSettings | None = None,
) -> tuple[ClassPictures, list[str]]:
    """Class pictures at the model's size, and the prompt of each.

    Raises:
        MifoError: see `class_picture_files`.
    """
    files, told = class_picture_files(model, prompts, settings, seed, performance)
    return ClassPictures(files, model.image_size), told


def class_picture_files(
    model: DiffusionModel,
    prompts: list[str],
    settings: PriorSettings,
    seed: int,
    performance: PerformanceSettings | None = None,
) -> tuple[list[Path], list[str]]:
    """The files of the class pictures, made where they are missing, and the prompt of each.

    They lie in `settings.folder`, or made by plain DDIM sampling, once for each model, prompt, size,
    seed and number of steps: picture i of a prompt is the same, up to rounding, however many are asked for
    and in whichever precision.

    Args:
        performance: precision of learning and CUDA graphs are taken from it; None: float32, no graphs.

    Raises:
        MifoError: see `own_picture_files`; or the cache can not be written.
    """
    if settings.folder is not None:
        files = own_picture_files(settings.folder)
        return files, [prompts[i % len(prompts)] for i in range(len(files))]
    wanted = _wanted(model, prompts, settings, seed)
    missing = [each for each in wanted if not is_whole(each[0], model.image_size)]
    if missing:
        _make(
            model, missing, settings, seed, performance or PerformanceSettings(learning_precision="float32")
        )
    return [file for file, *_ in wanted], [prompt for _, prompt, _ in wanted]


def check_room(model: DiffusionModel, prompts: list[str], settings: PriorSettings, seed: int) -> None:
    """Refuse a cache into which the class pictures that are missing can not be written.

    Raises:
        MifoError: naming the folder.
    """
    wanted = _wanted(model, prompts, settings, seed) if settings.folder is None else []
    for folder in {file.parent for file, *_ in wanted if not is_whole(file, model.image_size)}:
        with _writing(folder), TemporaryFile(dir=folder):
            pass


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Make a folder of the cache; what the system refuses there becomes a sentence."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise MifoError(
            f"{folder} can not be written ({error.strerror}), but class pictures are kept there; name "
            "another folder by learning.prior.cache=PATH."
        ) from error


def own_picture_files(given: str) -> list[Path]:
    """The pictures in the folder `settings.folder`.

    Raises:
        MifoError: it is no folder or holds no picture, or one of its pictures can not be read.
    """
    folder = existing_folder("learning.prior.folder", given, "class pictures, or take null to have them made")
    # a hidden file such as macOS's ._cat.jpg is no picture, whatever its ending
    files = sorted(
        file for file in folder.glob("*") if file.suffix.lower() in ENDINGS and not file.name.startswith(".")
    )
    if not files:
        raise MifoError(
            f"learning.prior.folder={folder} holds no picture; put PNG, JPEG or WebP files there."
        )
    for file in files:
        check_picture(file)
    return files


def _read(file: Path, side: int) -> Tensor:
    """(3, side, side) in [0, 1], the middle square of the picture."""
    image = pil_to_tensor(read_picture(file)).float() / 255
    return center_crop(resize(image, [side], antialias=True), [side, side]).clamp(0, 1)


def _wanted(
    model: DiffusionModel, prompts: list[str], settings: PriorSettings, seed: int
) -> list[tuple[Path, str, int]]:
    """The made pictures: the file, the prompt and the number among those of the prompt of each."""
    wanted = []
    for i, prompt in enumerate(prompts):
        share = (settings.pictures + len(prompts) - 1 - i) // len(prompts)
        folder = _folder(model, prompt, settings, seed)
        wanted += [(folder / f"{j:04}.png", prompt, j) for j in range(share)]
    return wanted


def _folder(model: DiffusionModel, prompt: str, settings: PriorSettings, seed: int) -> Path:
    """Where pictures of a prompt are kept."""
    identity = (model.fingerprint, prompt, model.image_size, seed, settings.steps, settings.guidance_scale)
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:12]
    return _cache(settings) / f"{re.sub(r'[^a-z0-9]+', '_', prompt.lower()).strip('_')[:40]}-{key}"


def _make(
    model: DiffusionModel,
    missing: list[tuple[Path, str, int]],
    settings: PriorSettings,
    seed: int,
    performance: PerformanceSettings,
) -> None:
    """Make pictures, each given by its file, its prompt and its number among those of the prompt."""
    dtype = getattr(torch, performance.learning_precision)
    # a cache of rounded weights would stay in memory, and no graph can be captured with it
    autocast = torch.autocast(
        model.device.type, dtype, enabled=dtype is not torch.float32, cache_enabled=False
    )
    schedule = NoiseSchedule.from_scheduler(model.noise_scheduler, model.device)
    sampling = SynthesisSettings(steps=settings.steps, guidance_scale=settings.guidance_scale)
    size = min(settings.batch_size or (16 if model.device.type == "cuda" else 4), len(missing))
    kept = KeptPasses()
    with Progress(transient=True) as progress:
        bar = progress.add_task("class pictures", total=len(missing) * settings.steps)
        for start in range(0, len(missing), size):
            chosen = missing[start : start + size]
            # graphs want the last batch as large as the others
            padded = chosen + chosen[-1:] * (size - len(chosen) if performance.cuda_graphs else 0)
            step = partial(progress.advance, bar, len(chosen))
            with autocast:
                latents = synthesize(
                    model.unet,
                    schedule,
                    encode_prompts(model, [""] * len(padded) + [prompt for _, prompt, _ in padded]),
                    torch.stack([_initial_noise(model, seed, i) for *_, i in padded]).to(model.device),
                    [],
                    [],
                    0,
                    sampling,
                    GuidanceSettings(),
                    on_step=lambda _, advance=step: advance(),
                    graphs=performance.cuda_graphs,
                    kept=kept,
                )
            images = decode_latents(model, latents[: len(chosen)], batch_size=2)
            for (file, *_), image in zip(chosen, images.cpu(), strict=True):
                # renamed when whole, so that a killed run or one beside this one leaves no half picture
                unfinished = file.with_suffix(f".{os.getpid()}.png")
                with _writing(file.parent):
                    to_pil_image(image).save(unfinished)
                    unfinished.replace(file)


def _initial_noise(model: DiffusionModel, seed: int, picture: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + picture)
    return torch.randn(
        model.unet.config.in_channels, model.latent_size, model.latent_size, generator=generator
    )


def _cache(settings: PriorSettings) -> Path:
    if settings.cache is not None:
        return Path(settings.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mifo" / "class_pictures"
