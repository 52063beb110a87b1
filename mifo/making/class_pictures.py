"""Pictures of the instances' classes, so that learning keeps the class (DreamBooth, arXiv 2208.12242)."""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

import torch
from rich.progress import Progress
from torchvision.transforms.functional import to_pil_image

from mifo.acceleration.settings import PerformanceSettings
from mifo.backbones.model import DiffusionModel
from mifo.data.class_pictures import ClassPictures, own_picture_files
from mifo.data.pictures import is_whole
from mifo.data.settings import PriorSettings
from mifo.errors import MifoError
from mifo.files import user_cache
from mifo.making.pictures import start_noise
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
    """Class pictures at the model's size, made where they are missing, and the prompt of each.

    They lie in `settings.folder`, or are made by plain sampling, once for each model, prompt, size,
    seed and number of steps: picture i of a prompt is the same, up to rounding, however many are asked for
    and in whichever precision.

    Args:
        performance: the precision of learning is taken from it; None: float32.

    Raises:
        MifoError: see `own_picture_files`; or the cache can not be written.
    """
    if settings.folder is not None:
        files = own_picture_files(settings.folder)
        return ClassPictures(files, model.image_size), [prompts[i % len(prompts)] for i in range(len(files))]
    wanted = _wanted(model, prompts, settings, seed)
    if missing := [each for each in wanted if not is_whole(each[0], model.image_size)]:
        _make(model, missing, settings, seed, performance.learning_precision if performance else "float32")
    return ClassPictures([file for file, *_ in wanted], model.image_size), [told for _, told, _ in wanted]


def check_cache(model: DiffusionModel, prompts: list[str], settings: PriorSettings, seed: int) -> None:
    """Refuse a cache into which the class pictures that are missing can not be written."""
    wanted = _wanted(model, prompts, settings, seed) if settings.folder is None else []
    for folder in {file.parent for file, *_ in wanted if not is_whole(file, model.image_size)}:
        with _writing(folder), TemporaryFile(dir=folder):
            pass


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Make a folder of the cache; turn errors of the system there into a sentence."""
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
    """Of each picture that is made: its file, its prompt, and its number among the pictures of the prompt."""
    sampled = (settings.steps, settings.guidance_scale, model.sampling())
    wanted = []
    for i, prompt in enumerate(prompts):
        share = (settings.pictures + len(prompts) - 1 - i) // len(prompts)
        identity = (model.fingerprint, prompt, model.image_size, seed, *sampled)
        key = hashlib.sha256(repr(identity).encode()).hexdigest()[:12]
        name = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:40]
        folder = cache_folder(settings) / f"{name}-{key}"
        wanted += [(folder / f"{j:04}.png", prompt, j) for j in range(share)]
    return wanted


def _make(
    model: DiffusionModel,
    missing: list[tuple[Path, str, int]],
    settings: PriorSettings,
    seed: int,
    precision: str,
) -> None:
    """Make pictures, each given as by `_wanted`."""
    for folder in {file.parent for file, *_ in missing}:
        for unfinished in folder.glob("*.*.png"):
            # a killed run left it; a younger one may be another run's, which is writing it and will rename it
            with suppress(FileNotFoundError):
                if time.time() - unfinished.stat().st_mtime > 3600:
                    unfinished.unlink()
    dtype = getattr(torch, precision)
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

            prompts = [""] * len(chosen) + [prompt for _, prompt, _ in chosen]
            noise = start_noise(model, [seed * 1_000_003 + i for *_, i in chosen])
            with autocast:
                latents = sampler(model.encode_prompts(prompts), noise, on_step=advance)
            images = model.decode_latents(latents, 2)
            for (file, *_), image in zip(chosen, images.cpu(), strict=True):
                # renamed when whole, so that neither a kill nor a run at the same time leaves half a picture
                unfinished = file.with_suffix(f".{os.getpid()}.png")
                with _writing(file.parent):
                    to_pil_image(image).save(unfinished)
                    unfinished.replace(file)


def cache_folder(settings: PriorSettings) -> Path:
    if settings.cache is not None:
        return Path(settings.cache).expanduser()
    return user_cache() / "class_pictures"
