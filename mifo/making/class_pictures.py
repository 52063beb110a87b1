"""Pictures of the instances' classes, so that learning keeps the class (DreamBooth, arXiv 2208.12242)."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import torch
from rich.progress import Progress
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from mifo.acceleration.settings import PerformanceSettings
from mifo.backbones.model import DiffusionModel
from mifo.data.class_pictures import ClassPictures, own_picture_files
from mifo.data.pictures import is_whole
from mifo.data.settings import PriorSettings
from mifo.errors import MifoError
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.synthesis.sampler import Sampler, StepReport
from mifo.method.synthesis.settings import SynthesisSettings


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
        performance: the precision of learning is taken from it; None: float32.

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


def check_cache(model: DiffusionModel, prompts: list[str], settings: PriorSettings, seed: int) -> None:
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
    sampled = (settings.steps, settings.guidance_scale, model.sampling())
    identity = (model.fingerprint, prompt, model.image_size, seed, *sampled)
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:12]
    return cache_folder(settings) / f"{re.sub(r'[^a-z0-9]+', '_', prompt.lower()).strip('_')[:40]}-{key}"


def _make(
    model: DiffusionModel,
    missing: list[tuple[Path, str, int]],
    settings: PriorSettings,
    seed: int,
    performance: PerformanceSettings,
) -> None:
    """Make pictures, each given by its file, its prompt and its number among those of the prompt."""
    dtype = getattr(torch, performance.learning_precision)
    # a cache of rounded weights would stay in memory
    autocast = torch.autocast(
        model.device.type, dtype, enabled=dtype is not torch.float32, cache_enabled=False
    )
    sampling = SynthesisSettings(steps=settings.steps, guidance_scale=settings.guidance_scale)
    sampler = Sampler(model, sampling, GuidanceSettings())
    size = min(settings.batch_size or (16 if model.device.type == "cuda" else 4), len(missing))
    with Progress(transient=True) as progress:
        bar = progress.add_task("class pictures", total=len(missing) * settings.steps)
        for start in range(0, len(missing), size):
            chosen = missing[start : start + size]

            def advance(_: StepReport, count: int = len(chosen)) -> None:
                progress.advance(bar, count)

            with autocast:
                latents = sampler(
                    model.encode_prompts([""] * len(chosen) + [prompt for _, prompt, _ in chosen]),
                    torch.stack([_initial_noise(model, seed, i) for *_, i in chosen]).to(model.device),
                    on_step=advance,
                )
            images = model.decode_latents(latents, 2)
            for (file, *_), image in zip(chosen, images.cpu(), strict=True):
                # renamed when whole, so that a killed run or one beside this one leaves no half picture
                unfinished = file.with_suffix(f".{os.getpid()}.png")
                with _writing(file.parent):
                    to_pil_image(image).save(unfinished)
                    unfinished.replace(file)


def _initial_noise(model: DiffusionModel, seed: int, picture: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + picture)
    return torch.randn(model.latent_shape, generator=generator)


def cache_folder(settings: PriorSettings) -> Path:
    if settings.cache is not None:
        return Path(settings.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mifo" / "class_pictures"
