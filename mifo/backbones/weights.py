"""The files of weights that a part of a pipeline is loaded from, and what tells weights apart."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mifo.errors import MifoError
from mifo.files import read_json, reason

STEMS = {
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
    "text_encoder_2": "model",
    "transformer": "diffusion_pytorch_model",
    "text_encoder_3": "model",
}


def weight_patterns(variant: str | None, parts: Collection[str]) -> list[str]:
    """Patterns of the names of weight files in a repository of the hub, of `parts` that have weights."""
    stems = {part: stem for part, stem in STEMS.items() if part in parts}
    if variant:
        return [f"{part}/{stem}*.{variant}*.safetensors" for part, stem in stems.items()]
    return [
        f"{part}/{stem}{ending}.safetensors"
        for part, stem in stems.items()
        for ending in ("", "-?????-of-?????")
    ]


def weight_files(folder: Path, part: str, variant: str | None) -> list[Path]:
    """The files from which transformers and diffusers load `part` of the pipeline `folder`.

    Raises:
        MifoError: a file is missing, or not as long as its head says, or the index of the shards is damaged.
    """
    stem, ending = STEMS[part], f".{variant}" if variant else ""
    whole = folder / part / f"{stem}{ending}.safetensors"
    index = folder / part / f"{stem}.safetensors.index{ending}.json"
    # where both are there, transformers takes the whole file and diffusers the shards
    if index.is_file() and not (part.startswith("text_encoder") and whole.is_file()):
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise MifoError(f"{index} is damaged: it holds no weight_map; copy or download it again.")
        files = [folder / part / name for name in sorted(set(shards.values()))]
    else:
        files = [whole]
    for file in files:
        if not file.is_file():
            others = sorted(other.name for other in (folder / part).glob(f"{stem}*.safetensors"))
            hint = f" (beside it lies {others[0]}: does model.variant name that?)" if others else ""
            raise MifoError(f"{file} is missing{hint}; complete the model's folder.")
        try:
            with safe_open(file, "pt"):
                pass  # the head, which is compared with the length of the file
        except (OSError, SafetensorError) as error:
            raise MifoError(f"{file} is damaged ({reason(error)}); copy or download it again.") from error
    return files


def first_rows(files: Iterable[Path]) -> dict[str, Tensor]:
    """The first row of every tensor in the weight files of a part, by name; counters of batches have none."""
    rows: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            rows |= {name: each[:1] for name, each in slices.items() if each.get_shape()}
    return rows


def fingerprint(rows: Mapping[str, Mapping[str, Tensor]]) -> str:
    """SHA-256 of the first row of every tensor: quick on gigabytes, yet any fine-tuning changes it.

    Args:
        rows: of every part by its name, by the names in its weight files; how a part is sharded makes no
            difference.
    """
    digest = hashlib.sha256()
    for part in (part for part in STEMS if part in rows):
        for name in sorted(rows[part]):
            if "position_ids" not in name:
                digest.update(name.encode())
                digest.update(rows[part][name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
