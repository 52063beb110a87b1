"""Loading a text-to-image pipeline folder, whether it is embedded, local or on the hub."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Self

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from mifo.errors import MifoError
from mifo.models.settings import ModelSettings

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")


@dataclass
class DiffusionModel:
    """The parts of a latent diffusion model, and where they came from.

    `fingerprint` tells base weights apart: it does not depend on where they lie, how they are sharded,
    or the dtype they are loaded in.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    name: str
    source: str
    revision: str | None
    fingerprint: str

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def latent_size(self) -> int:
        """Side of a latent, in latent pixels."""
        return self.unet.config.sample_size

    @property
    def image_size(self) -> int:
        """Side of a picture, in pixels."""
        return self.latent_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def prediction_type(self) -> str:
        """ "epsilon" or "v_prediction"."""
        return self.noise_scheduler.config.prediction_type

    def to(self, device: torch.device | str) -> Self:
        """Move every part to `device`, in place."""
        for part in (self.text_encoder, self.vae, self.unet):
            part.to(device)
        return self


@dataclass(frozen=True)
class Outline:
    """A pipeline without its weights, read in a moment: what prompts and boxes are checked against.

    The U-Net has its layers and no numbers (device "meta").
    """

    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler


def model_folder(settings: ModelSettings) -> Path:
    """The local pipeline folder of `settings.source`; a hub id is downloaded first if the cache lacks it.

    Raises:
        MifoError: nothing lies there, a part of the pipeline is missing, or the hub does not give it.
    """
    if settings.source == "embedded":
        folder = Path(str(files("mifo"))) / "miniature" / "weights" / "pipeline"
    elif Path(settings.source).expanduser().is_dir():
        folder = Path(settings.source).expanduser()
    elif Path(settings.source).expanduser().is_file():
        raise MifoError(
            f"model.source={settings.source} is a single file; name a folder in the diffusers layout."
        )
    else:
        folder = _from_hub(settings)
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise MifoError(
            f"model.source={settings.source} is no diffusers pipeline folder: it lacks {', '.join(missing)}; "
            "name a folder that holds " + ", ".join(PARTS) + "."
        )
    return folder


def _from_hub(settings: ModelSettings) -> Path:
    patterns = [f"{part}/*{ending}" for part in PARTS for ending in (".json", ".txt", ".safetensors")]
    try:
        return Path(
            snapshot_download(
                settings.source,
                revision=settings.revision,
                allow_patterns=["model_index.json", *patterns],
                ignore_patterns=["*.fp16.*", "*non_ema*"],
            )
        )
    except (OSError, ValueError) as error:  # every error of the hub's client is one of the two
        revision = f" at revision {settings.revision}" if settings.revision else ""
        raise MifoError(
            f"model.source={settings.source}{revision} is neither a local folder nor to be had from the hub "
            f"({type(error).__name__}); check the spelling and the network, or name a local folder."
        ) from error


def load_model(settings: ModelSettings, device: torch.device | str = "cpu") -> DiffusionModel:
    """Load the pipeline of `settings` for inference, all weights frozen, the VAE in float32.

    Raises:
        MifoError: see `model_folder`; or an unknown dtype, or files that are damaged or of other classes.
    """
    if settings.dtype not in ("float32", "float16", "bfloat16"):
        raise MifoError(f"model.dtype={settings.dtype} is not known; take float32, float16 or bfloat16.")
    folder, dtype = model_folder(settings), getattr(torch, settings.dtype)
    options = {"use_safetensors": True, "local_files_only": True}
    with _refusing_damage(settings, folder):
        model = DiffusionModel(
            CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True),
            CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype, **options),
            AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32, **options),
            UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, **options),
            DDPMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True),
            settings.name,
            settings.source,
            settings.revision,
            _fingerprint(folder),
        )
    for part in (model.text_encoder, model.vae, model.unet):
        part.requires_grad_(False).eval()
    return model.to(device)


def load_outline(settings: ModelSettings) -> Outline:
    """Read the pipeline of `settings` but for its weights. Raises MifoError as `load_model` does."""
    folder = model_folder(settings)
    with _refusing_damage(settings, folder), torch.device("meta"):
        config = UNet2DConditionModel.load_config(folder, subfolder="unet", local_files_only=True)
        unet = UNet2DConditionModel.from_config(config)
    with _refusing_damage(settings, folder):
        return Outline(
            CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True),
            unet,
            DDPMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True),
        )


@contextmanager
def _refusing_damage(settings: ModelSettings, folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MifoError(
            f"model.source={settings.source} could not be loaded from {folder} ({reason}); "
            "is the folder complete and in the diffusers layout with safetensors weights?"
        ) from error


def _fingerprint(folder: Path) -> str:
    """SHA-256 of the first row of every tensor: quick on gigabytes, yet any fine-tuning changes it."""
    digest = hashlib.sha256()
    for part in ("text_encoder", "vae", "unet"):
        rows = {}
        for file in (folder / part).glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                rows |= {
                    name: tensors.get_slice(name)[:1]
                    for name in sorted(tensors.keys())
                    if "position_ids" not in name
                }
        for name in sorted(rows):
            digest.update(name.encode())
            digest.update(rows[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
