"""Loading a text-to-image pipeline: embedded, a local folder or single file, or on the hub."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import constants, snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel, Qwen2Tokenizer, T5Tokenizer

from mifo.backbones.imported import check_imports, teach_words, with_imports
from mifo.backbones.kinds import FAMILIES, WITH_T5, Family, check_kind, family_of, pipeline_index
from mifo.backbones.latent import LatentModel
from mifo.backbones.mmdit.model import T5_TOKENS
from mifo.backbones.qwen import TOKENS
from mifo.backbones.settings import ModelSettings
from mifo.backbones.weights import fingerprint, first_rows, weight_files, weight_patterns
from mifo.errors import MifoError, check_known, check_package, first_line
from mifo.files import WEIGHTS, check_entries

EMBEDDED = {"embedded": "pipeline", "embedded_mmdit": "pipeline_mmdit"}  # folders of the package's weights
DTYPES = ("float32", "float16", "bfloat16")
FIRST_KEY = "model.diffusion_model.input_blocks.0.0.weight"  # of a single file under its original key names


def model_folder(settings: ModelSettings, weights: bool = True) -> Path:
    """The local pipeline folder of `settings.source`; a hub id is downloaded first if the cache lacks it.

    Of a single file this is the folder `settings.config`, whose weights are not used.

    Args:
        weights: of a hub id, download the weights too, not its small files alone.

    Raises:
        MifoError: nothing lies there, a part of the pipeline is missing, or the hub does not give it.
    """
    local = Path(settings.source).expanduser()
    if local.is_file():
        return _folder_beside(settings, local)
    if settings.config:
        raise MifoError(f"model.config={settings.config} is for a single file; leave it out for a folder.")
    if settings.source in EMBEDDED:
        folder = WEIGHTS / EMBEDDED[settings.source]
    elif local.is_dir():
        folder = local
    else:
        folder = _from_hub(settings, weights)
    parts = family_of(folder, settings.t5).folders
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise MifoError(
            f"model.source={settings.source} is no diffusers pipeline folder: it lacks {', '.join(missing)}; "
            "name a folder that holds " + ", ".join(parts) + "."
        )
    return folder


def _folder_beside(settings: ModelSettings, file: Path) -> Path:
    """The folder of the tokenizers and configurations of a single file."""
    try:
        with safe_open(file, "pt") as tensors:
            shapes = {
                name: torch.empty(tensors.get_slice(name).get_shape(), device="meta")
                for name in tensors.keys()  # noqa: SIM118
            }
    except Exception as error:  # of the library's own class
        raise MifoError(
            f"model.source={settings.source} is a single file, but none of safetensors ({error}); "
            "name a .safetensors file, or a folder in the diffusers layout."
        ) from error
    if FIRST_KEY not in shapes:
        raise MifoError(
            f"model.source={settings.source} has no {FIRST_KEY}: no whole checkpoint of Stable Diffusion "
            "under the original key names; name one of 1.x, 2.x or XL, or a folder in the diffusers layout."
        )
    config = settings.config or fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
    try:
        return model_folder(replace(settings, source=config, config=None), weights=False)
    except MifoError as error:
        raise MifoError(
            f"model.source={settings.source} is a single file, and its tokenizers and configurations are "
            f"not to be had from {config}; name a diffusers folder or hub id of its kind by model.config."
        ) from error


def _from_hub(settings: ModelSettings, weights: bool) -> Path:
    families = [*FAMILIES.values(), *([WITH_T5] if settings.t5 else [])]
    parts = sorted({part for family in families for part in family.folders})
    patterns = [f"{part}/*{ending}" for part in parts for ending in (".json", ".txt", ".jinja")]
    try:
        return Path(
            snapshot_download(
                settings.source,
                revision=settings.revision,
                allow_patterns=[
                    "model_index.json",
                    *patterns,
                    *(weight_patterns(settings.variant, parts) if weights else ()),
                ],
            )
        )
    except (OSError, ValueError) as error:  # every error of the hub's client is one of the two
        revision = f" at revision {settings.revision}" if settings.revision else ""
        remedy = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "check the spelling and the network"
        raise MifoError(
            f"model.source={settings.source}{revision} is neither a local folder nor to be had from the hub "
            f"({type(error).__name__}); {remedy}, or name a local folder."
        ) from error


def load_model(settings: ModelSettings, device: torch.device | str = "cpu") -> LatentModel:
    """Load the pipeline of `settings` for inference, all weights frozen, the VAE in float32.

    Raises:
        MifoError: see `load_outline`, which comes before weights are downloaded or read; or weights that are
            missing or damaged.
    """
    outline = load_outline(settings)
    folder, file = model_folder(settings), Path(settings.source).expanduser()
    family = family_of(folder, settings.t5)
    vocabulary = "".join(json.dumps(sorted(each.get_vocab().items())) for each in outline.tokenizers)
    with _refusing_damage(settings, folder):
        single = file.is_file()
        networks, rows = _of_file(file, folder, family) if single else _of_folder(settings, folder, family)
        for part, network in networks.items():
            dtype = torch.float32 if part == "vae" else getattr(torch, settings.dtype)
            freeze_in(dtype, network)
        model = replace(
            outline,
            **networks,
            fingerprint=fingerprint(rows),
            vocabulary=hashlib.sha256(vocabulary.encode()).hexdigest()[:12],
        )
    return with_imports(model, family, settings).to(device)


def freeze_in(dtype: torch.dtype, network: nn.Module) -> None:
    """Bring a network to a precision, in place, unless it has it already; nothing of it learns."""
    if any(each.dtype != dtype for each in network.parameters()):
        nn.Module.to(network, dtype)  # also buffers, of which some must keep 32 bits
    network.requires_grad_(False).eval()


def _of_folder(
    settings: ModelSettings, folder: Path, family: Family
) -> tuple[dict[str, Any], dict[str, Mapping[str, Tensor]]]:
    """The networks of a pipeline folder, and the first rows of their weights."""
    weights = {part: weight_files(folder, part, settings.variant) for part in family.networks}
    networks = {}
    for part in family.networks:
        kind, dtype = family.parts[part], getattr(torch, "float32" if part == "vae" else settings.dtype)
        networks[part], told = kind.from_pretrained(
            folder,
            subfolder=part,
            variant=settings.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **{"dtype" if issubclass(kind, PreTrainedModel) else "torch_dtype": dtype},
        )
        if told["missing_keys"]:  # which would go on with random numbers
            raise ValueError(f"{part} lacks the weights {sorted(told['missing_keys'])[0]}")
    return networks, {part: first_rows(weights[part]) for part in family.networks}


def _of_file(
    file: Path, folder: Path, family: Family
) -> tuple[dict[str, Any], dict[str, Mapping[str, Tensor]]]:
    """The networks of a single file under the original key names, and the first rows of their weights.

    The rows have the names of a folder on the hub, so that the same weights there have the same fingerprint.
    """
    check_package("a single file", "accelerate")  # without it, diffusers lets missing weights be random
    with safe_open(file, "pt") as tensors:
        dtype = tensors.get_tensor(FIRST_KEY).dtype
    # a bar for each part, and a warning about each cast, though no module must keep its precision
    diffusers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    pipeline = getattr(diffusers, family.pipeline).from_single_file(
        str(file), config=str(folder), torch_dtype=dtype, local_files_only=True
    )
    networks = {part: getattr(pipeline, part) for part in family.networks}
    rows: dict[str, Mapping[str, Tensor]] = {
        part: {name: each[:1].clone() for name, each in network.state_dict().items()}
        for part, network in networks.items()
    }
    # transformers leaves the prefix out from 5.6 on
    rows["text_encoder"] = {
        f"text_model.{name.removeprefix('text_model.')}": row for name, row in rows["text_encoder"].items()
    }
    return networks, rows


def load_outline(settings: ModelSettings) -> LatentModel:
    """The model of `settings` without its weights, read in a moment, to check prompts, boxes and sites on.

    Raises:
        MifoError: an unknown dtype; see `model_folder` and `check_kind`; files are damaged; the scheduler is
            not supported, see the model's `process`; or the tokenizer has a word for which the text encoder
            has no row.
    """
    check_known("model.dtype", settings.dtype, DTYPES)
    folder = model_folder(settings, weights=False)
    check_entries(folder)
    with _refusing_damage(settings, folder):
        family = family_of(folder, settings.t5)
        configs = check_kind(folder, settings.source, family)
        tokenizers = {
            part: _tokenizer(folder, part, kind, configs[part.replace("tokenizer", "text_encoder")])
            for part, kind in family.parts.items()
            if part not in family.networks
        }
        teach_words(settings, list(tokenizers.values()))
        widths = [
            family.parts[part].config_class.from_dict(configs[part]).hidden_size
            for part in family.networks
            if part.startswith("text_encoder")
        ]
        check_imports(settings, widths)
        denoiser = family.model.part
        index = {"force_zeros_for_empty_prompt": family.zero_empty_prompt} | pipeline_index(folder)
        with torch.device("meta"):
            network = family.parts[denoiser].from_config(configs[denoiser])
        outline = family.model(
            **tokenizers,
            **{denoiser: network},
            **family.model.options(settings, index, configs),
            text_encoder=None,
            vae=None,
            noise_scheduler=family.scheduler(folder),
            name=settings.name,
            source=settings.source,
            revision=settings.revision,
            fingerprint="",
            vocabulary="",
        )
        _ = outline.process  # refuses a scheduler that it does not know
        return outline


# by tokenizers: the length of prompts, unless the text encoder tells it, and the rows of text encoders
_USUAL = {CLIPTokenizer: (77, 49408), T5Tokenizer: (T5_TOKENS, 32128), Qwen2Tokenizer: (TOKENS, 151936)}


def _tokenizer(folder: Path, part: str, kind: Any, text_encoder: dict[str, Any]) -> Any:
    """A tokenizer, whose prompts are as long as its text encoder reads."""
    names = {file.name for file in (folder / part).iterdir()}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        # transformers would go on with a tokenizer that knows no word
        raise MifoError(f"{folder / part} lacks tokenizer.json, or vocab.json and merges.txt; add the files.")
    tokenizer = kind.from_pretrained(folder, subfolder=part, local_files_only=True)
    if kind is Qwen2Tokenizer and not tokenizer.chat_template:
        raise MifoError(f"{folder / part} lacks the chat template; add chat_template.jinja.")
    # old tokenizers do not tell their length, which then is 10³⁰
    positions, rows = _USUAL[kind]
    if kind is CLIPTokenizer:
        positions = text_encoder.get("max_position_embeddings", positions)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    rows = text_encoder.get("vocab_size", rows)
    beyond = {number: word for word, number in tokenizer.get_vocab().items() if number >= rows}
    if beyond:
        raise MifoError(
            f"the tokenizer in {folder} knows the word {beyond[min(beyond)]}, but the text encoder's {rows} "
            "rows hold none for it; take the tokenizer and the text encoder from one model."
        )
    return tokenizer


@contextmanager
def _refusing_damage(settings: ModelSettings, folder: Path) -> Iterator[None]:
    """Turn what the libraries raise on damaged files, which is nearly anything, into a sentence."""
    try:
        yield
    except MifoError:
        raise
    except Exception as error:  # the tokenizers library raises this very class
        reason = first_line(error)
        raise MifoError(
            f"model.source={settings.source} could not be loaded from {folder} ({reason}); "
            "is the folder complete and in the diffusers layout with safetensors weights?"
        ) from error
