"""Pictures of the instances' classes, so that learning keeps the class (DreamBooth, arXiv 2208.12242)."""

import hashlib
import os
import re
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
from mifo.models.images import decode_latents
from mifo.models.loading import DiffusionModel
from mifo.models.text import encode_prompts
from mifo.prompts.articles import article
from mifo.synthesis.sampler import synthesize
from mifo.synthesis.settings import SynthesisSettings

UNKNOWN_CLASS = "thing"
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def class_prompts(instances: InstanceSet, settings: PriorSettings) -> list[str]:
    """The prompts of the class pictures: those of the settings, once for every class of the instances."""
    names = dict.fromkeys(instances.class_names or [UNKNOWN_CLASS])
    classes = [f"{article(name)} {name}" for name in names]
    told = (prompt.replace("{class}", each) for prompt in settings.prompts for each in classes)
    return list(dict.fromkeys(told))


def class_pictures(
    model: DiffusionModel, prompts: list[str], settings: PriorSettings, seed: int
) -> tuple[Tensor, list[str]]:
    """Class pictures (M, 3, H, W) in [0, 1] at the model's size, and the prompt of each.

    They are read from `settings.folder`, or made by plain DDIM sampling, once for each model, prompt, size,
    seed and number of steps: picture i of a prompt is the same however many are asked for.

    Raises:
        MifoError: the folder holds no readable picture.
    """
    if settings.folder is not None:
        files = _picture_files(Path(settings.folder).expanduser())
        return torch.stack([_read(file, model.image_size) for file in files]), [
            prompts[i % len(prompts)] for i in range(len(files))
        ]
    files, told = [], []
    for i, prompt in enumerate(prompts):
        share = (settings.pictures + len(prompts) - 1 - i) // len(prompts)
        files += _made_pictures(model, prompt, share, settings, seed)
        told += [prompt] * share
    return torch.stack([_read(file, model.image_size) for file in files]), told


def _picture_files(folder: Path) -> list[Path]:
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


def _made_pictures(
    model: DiffusionModel, prompt: str, count: int, settings: PriorSettings, seed: int
) -> list[Path]:
    """Files of `count` pictures of `prompt`; those that are not yet in the cache are made now."""
    identity = (model.fingerprint, prompt, model.image_size, seed, settings.steps, settings.guidance_scale)
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:12]
    folder = _cache(settings) / f"{re.sub(r'[^a-z0-9]+', '_', prompt.lower()).strip('_')[:40]}-{key}"
    files = [folder / f"{i:04}.png" for i in range(count)]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    if not missing:
        return files
    folder.mkdir(parents=True, exist_ok=True)
    text = encode_prompts(model, ["", prompt])
    schedule = NoiseSchedule.from_scheduler(model.noise_scheduler, model.device)
    sampling = SynthesisSettings(steps=settings.steps, guidance_scale=settings.guidance_scale)
    with Progress(transient=True) as progress:
        bar = progress.add_task(f"class pictures: {prompt}", total=len(missing) * settings.steps)
        for start in range(0, len(missing), settings.batch_size):
            chosen = missing[start : start + settings.batch_size]
            noise = torch.stack([_initial_noise(model, seed, i) for i in chosen]).to(model.device)
            step = partial(progress.advance, bar, len(chosen))
            latents = synthesize(
                model.unet,
                schedule,
                text.repeat_interleave(len(chosen), 0),
                noise,
                [],
                [],
                0,
                sampling,
                GuidanceSettings(),
                on_step=lambda _, advance=step: advance(),
            )
            for i, image in zip(chosen, decode_latents(model, latents).cpu(), strict=True):
                # renamed when whole, so that a killed run or one beside this one leaves no half picture
                unfinished = files[i].with_suffix(f".{os.getpid()}.png")
                to_pil_image(image).save(unfinished)
                unfinished.replace(files[i])
    return files


def _initial_noise(model: DiffusionModel, seed: int, picture: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + picture)
    return torch.randn(
        model.unet.config.in_channels, model.latent_size, model.latent_size, generator=generator
    )


def _cache(settings: PriorSettings) -> Path:
    if settings.cache is not None:
        return Path(settings.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mifo" / "class_pictures"
