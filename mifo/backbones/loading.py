"""Loading a text-to-image pipeline folder, whether it is embedded, local or on the hub."""

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download
from transformers import CLIPTextModel, CLIPTokenizer

from mifo.backbones.kinds import check_kind
from mifo.backbones.settings import ModelSettings
from mifo.backbones.unet.model import UNetModel
from mifo.backbones.weights import fingerprint, weight_files, weight_patterns
from mifo.errors import MifoError
from mifo.files import read_json
from mifo.method.diffusion.ddim import DDIM

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")


def model_folder(settings: ModelSettings, weights: bool = True) -> Path:
    """The local pipeline folder of `settings.source`; a hub id is downloaded first if the cache lacks it.

    Args:
        weights: of a hub id, download the weights too, not its small files alone.

    Raises:
        MifoError: nothing lies there, a part of the pipeline is missing, or the hub does not give it.
    """
    local = Path(settings.source).expanduser()
    if settings.source == "embedded":
        folder = Path(str(files("mifo"))) / "miniature" / "weights" / "pipeline"
    elif local.is_dir():
        folder = local
    elif local.is_file():
        raise MifoError(
            f"model.source={settings.source} is a single file, which MIFO does not read; convert it to a "
            "folder in the diffusers layout (StableDiffusionPipeline.from_single_file, then save_pretrained)."
        )
    else:
        folder = _from_hub(settings, weights)
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise MifoError(
            f"model.source={settings.source} is no diffusers pipeline folder: it lacks {', '.join(missing)}; "
            "name a folder that holds " + ", ".join(PARTS) + "."
        )
    return folder


def _from_hub(settings: ModelSettings, weights: bool) -> Path:
    patterns = [f"{part}/*{ending}" for part in PARTS for ending in (".json", ".txt")]
    try:
        return Path(
            snapshot_download(
                settings.source,
                revision=settings.revision,
                allow_patterns=[
                    "model_index.json",
                    *patterns,
                    *(weight_patterns(settings.variant) if weights else ()),
                ],
            )
        )
    except (OSError, ValueError) as error:  # every error of the hub's client is one of the two
        revision = f" at revision {settings.revision}" if settings.revision else ""
        raise MifoError(
            f"model.source={settings.source}{revision} is neither a local folder nor to be had from the hub "
            f"({type(error).__name__}); check the spelling and the network, or name a local folder."
        ) from error


def load_model(settings: ModelSettings, device: torch.device | str = "cpu") -> UNetModel:
    """Load the pipeline of `settings` for inference, all weights frozen, the VAE in float32.

    Raises:
        MifoError: see `load_outline`, which comes before weights are downloaded or read; or an unknown dtype;
            or weights that are missing or damaged.
    """
    if settings.dtype not in ("float32", "float16", "bfloat16"):
        raise MifoError(f"model.dtype={settings.dtype} is not known; take float32, float16 or bfloat16.")
    outline = load_outline(settings)
    folder, dtype = model_folder(settings), getattr(torch, settings.dtype)
    weights = {part: weight_files(folder, part, settings.variant) for part in ("text_encoder", "vae", "unet")}
    vocabulary = json.dumps(sorted(outline.tokenizer.get_vocab().items()))

    def loaded(kind: Any, part: str, **precision: torch.dtype) -> Any:
        model, told = kind.from_pretrained(
            folder,
            subfolder=part,
            variant=settings.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **precision,
        )
        if told["missing_keys"]:  # which would go on with random numbers
            raise ValueError(f"{part} lacks the weights {sorted(told['missing_keys'])[0]}")
        return model.requires_grad_(False).eval()

    with _refusing_damage(settings, folder):
        model = UNetModel(
            outline.tokenizer,
            loaded(CLIPTextModel, "text_encoder", dtype=dtype),
            loaded(AutoencoderKL, "vae", torch_dtype=torch.float32),
            loaded(UNet2DConditionModel, "unet", torch_dtype=dtype),
            outline.noise_scheduler,
            settings.name,
            settings.source,
            settings.revision,
            fingerprint(weights),
            hashlib.sha256(vocabulary.encode()).hexdigest()[:12],
        )
    return model.to(device)


def load_outline(settings: ModelSettings) -> UNetModel:
    """The model of `settings` without its weights, read in a moment, to check prompts, boxes and sites.

    Raises:
        MifoError: see `model_folder` and `check_kind`; files are damaged; the scheduler is not supported, see
            `DDIM`; or the tokenizer has a word for which the text encoder has no row.
    """
    folder = model_folder(settings, weights=False)
    with _refusing_damage(settings, folder):
        configs = check_kind(folder, settings.source)
        tokenizer = _tokenizer(folder, configs["text_encoder"])
        noise_scheduler = _noise_scheduler(folder)
        DDIM.from_scheduler(noise_scheduler)
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(configs["unet"])
        return UNetModel(
            tokenizer,
            None,
            None,
            unet,
            noise_scheduler,
            settings.name,
            settings.source,
            settings.revision,
            "",
            "",
        )


def _tokenizer(folder: Path, text_encoder: dict[str, Any]) -> CLIPTokenizer:
    """The tokenizer, whose prompts are as long as the text encoder reads."""
    names = {file.name for file in (folder / "tokenizer").iterdir()}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        # transformers would go on with a tokenizer that knows no word
        raise MifoError(
            f"{folder / 'tokenizer'} lacks tokenizer.json, or vocab.json and merges.txt; add the files."
        )
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
    # old tokenizers do not tell their length, which then is 10³⁰
    positions = text_encoder.get("max_position_embeddings", 77)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    rows = text_encoder.get("vocab_size", 49408)
    beyond = {number: word for word, number in tokenizer.get_vocab().items() if number >= rows}
    if beyond:
        raise MifoError(
            f"the tokenizer in {folder} knows the word {beyond[min(beyond)]}, but the text encoder's {rows} "
            "rows hold none for it; take the tokenizer and the text encoder from one model."
        )
    return tokenizer


def _noise_scheduler(folder: Path) -> DDIMScheduler:
    """The model's scheduler as DDIM, whichever class it has itself; keys that DDIM lacks have no effect."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    name = config.get("_class_name", "DDIMScheduler")
    own = inspect.signature(getattr(diffusers, name)).parameters if name in DDIMScheduler._compatibles else {}
    # a missing key takes the default of its own class; only DDIM and DDPM clip, and only where they say so
    known = {"clip_sample": False, "set_alpha_to_one": False}
    known |= {key: each.default for key, each in own.items() if each.default is not each.empty} | config
    if "beta_start" not in own:
        raise MifoError(
            f"scheduler/scheduler_config.json in {folder} is of the class {name}, which has no betas for "
            "DDIM; name a text-to-image model of Stable Diffusion 1.x or 2.x's kind."
        )
    wanted = inspect.signature(DDIMScheduler).parameters
    return DDIMScheduler(**{key: value for key, value in known.items() if key in wanted})


@contextmanager
def _refusing_damage(settings: ModelSettings, folder: Path) -> Iterator[None]:
    """Turn what the libraries raise on damaged files, which is nearly anything, into a sentence."""
    try:
        yield
    except MifoError:
        raise
    except Exception as error:  # the tokenizers library raises this very class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MifoError(
            f"model.source={settings.source} could not be loaded from {folder} ({reason}); "
            "is the folder complete and in the diffusers layout with safetensors weights?"
        ) from error
