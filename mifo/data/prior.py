"""Pictures of the instances' classes, so that learning keeps the class (DreamBooth, arXiv 2208.12242)."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import to_pil_image
from torchvision.transforms.v2.functional import center_crop, resize

from mifo.data.instances import InstanceSet
from mifo.diffusion.noise_schedule import NoiseSchedule
from mifo.errors import MifoError
from mifo.guidance.settings import GuidanceSettings
from mifo.learning.settings import PriorSettings
from mifo.models.base import sampling_of
from mifo.models.images import decode_latents
from mifo.models.loading import DiffusionModel
from mifo.models.text import encode_prompts
from mifo.performance.settings import PerformanceSettings
from mifo.prompts.articles import article
from mifo.synthesis.sampler import KeptPasses, synthesize
from mifo.synthesis.settings import SynthesisSettings

UNKNOWN_CLASS = "thing"
READ_AT_ONCE = 16  # pictures in memory
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


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
        MifoError: see `own_picture_files`.
    """
    if settings.folder is not None:
        files = own_picture_files(settings.folder)
        return files, [prompts[i % len(prompts)] for i in range(len(files))]
    files, told, missing = [], [], []
    for i, prompt in enumerate(prompts):
        share = (settings.pictures + len(prompts) - 1 - i) // len(prompts)
        wanted = [(_folder(model, prompt, settings, seed) / f"{j:04}.png", prompt, j) for j in range(share)]
        files += [file for file, _, _ in wanted]
        told += [prompt] * share
        missing += [each for each in wanted if not each[0].exists()]
    if missing:
        _make(
            model, missing, settings, seed, performance or PerformanceSettings(learning_precision="float32")
        )
    return files, told


def own_picture_files(given: str) -> list[Path]:
    """The pictures in the folder `settings.folder`.

    Raises:
        MifoError: it is no folder, or holds no picture.
    """
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise MifoError(
            f"learning.prior.folder={folder} is not a folder; name one with pictures, or take null to have "
            "them made."
        )
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in IMAGE_ENDINGS)
    if not files:
        raise MifoError(
            f"learning.prior.folder={folder} holds no picture; put PNG, JPEG or WebP files there."
        )
    return files


def _read(file: Path, side: int) -> Tensor:
    """(3, side, side) in [0, 1], the middle square of the picture."""
    try:
        image = decode_image(str(file), ImageReadMode.RGB).float() / 255
    except RuntimeError as error:
        raise MifoError(
            f"{file} can not be read as an image ({error}); remove it or save it anew."
        ) from error
    return center_crop(resize(image, [side], antialias=True), [side, side]).clamp(0, 1)


def _folder(model: DiffusionModel, prompt: str, settings: PriorSettings, seed: int) -> Path:
    """Where pictures of a prompt are kept."""
    sampled = (settings.steps, settings.guidance_scale, sampling_of(model))
    identity = (model.fingerprint, prompt, model.image_size, seed, *sampled)
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
                file.parent.mkdir(parents=True, exist_ok=True)
                unfinished = file.with_suffix(f".{os.getpid()}.png")
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
