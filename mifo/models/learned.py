"""Saving what was learned apart from the base model, and putting it back on top of it.

A folder `learned/` holds

    learned.json                what it is: base model, tokens, class names, stages
    tokens.safetensors          the new token rows
    unet.safetensors            the U-Net's weights that learned, if any
    text_encoder.safetensors    the text encoder's weights that learned, if any
    config.yaml                 the configuration of the run
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mifo.errors import MifoError
from mifo.models.base import base_of, check_base
from mifo.models.loading import DiffusionModel
from mifo.models.tokens import add_instance_tokens
from mifo.models.trainable import add_lora, new_rows, trainable_parameters

FORMAT = 1


@dataclass(frozen=True)
class Learned:
    """What `learned.json` says. `stages` maps the name of a stage to the steps it took."""

    tokens: list[str]
    class_names: list[str] | None
    initializers: list[str | None] | None
    stages: dict[str, int]
    learn: str
    lora_rank: int
    base: dict[str, str | None]
    prediction_type: str
    format: int = FORMAT


def save_learned(
    folder: Path | str,
    model: DiffusionModel,
    *,
    class_names: Sequence[str] | None,
    initializers: Sequence[str | None] | None,
    stages: Mapping[str, int],
    learn: str,
    lora_rank: int,
    half: bool = False,
    config: str = "",
) -> Learned:
    """Write the new token rows and the weights that `learn` names into the new folder `folder`.

    The folder appears whole or not at all.

    Args:
        learn: see `trainable_parameters`; "tokens" saves nothing but the rows.
        half: round the weights, not the rows, to float16.
        config: YAML text of the run's configuration.

    Raises:
        MifoError: `folder` exists already.
    """
    folder = Path(folder)
    refuse_existing(folder)
    learned = Learned(
        tokens=list(model.text_encoder.get_input_embeddings().tokens),
        class_names=None if class_names is None else list(class_names),
        initializers=None if initializers is None else list(initializers),
        stages=dict(stages),
        learn=learn,
        lora_rank=lora_rank,
        base=base_of(model),
        prediction_type=model.prediction_type,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}") as unfinished:
        target = Path(unfinished) / folder.name
        target.mkdir()
        save_file({"rows": new_rows(model).detach().float().cpu()}, target / "tokens.safetensors")
        for part, parameters in trainable_parameters(model, learn).items():
            dtype = torch.float16 if half else None
            tensors = {name: each.detach().to("cpu", dtype).contiguous() for name, each in parameters.items()}
            if tensors:
                save_file(tensors, target / f"{part}.safetensors")
        (target / "learned.json").write_text(json.dumps(asdict(learned), indent=2) + "\n", encoding="utf-8")
        (target / "config.yaml").write_text(config, encoding="utf-8")
        os.rename(target, folder)
    return learned


def refuse_existing(folder: Path | str) -> None:
    """Raise `MifoError` if `folder` exists: a result never replaces another."""
    if Path(folder).exists():
        raise MifoError(
            f"{folder} exists already and is not replaced; choose another folder or move it away."
        )


def read_learned(folder: Path | str) -> Learned:
    """Read `learned.json` alone, before any model is loaded.

    Raises:
        MifoError: `folder` holds no learned result, or one of another format.
    """
    file = Path(folder) / "learned.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        written = content["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MifoError(
            f"{folder} holds no learned result (a readable learned.json); name one that `mifo learn` wrote."
        ) from error
    if written != FORMAT:
        raise MifoError(
            f"{folder} has format {written}, this version of MIFO reads {FORMAT}; learn it again."
        )
    return Learned(**content)


def load_learned(folder: Path | str, model: DiffusionModel) -> Learned:
    """Put a learned result on top of the base model that it belongs to, in place.

    Raises:
        MifoError: not a learned result, damaged files, or one that belongs to another base model.
    """
    learned = read_learned(folder)
    check_base(folder, learned.base | {"prediction_type": learned.prediction_type}, model)
    add_instance_tokens(model, learned.tokens)
    if learned.learn == "lora":
        add_lora(model, learned.lora_rank)
    targets = {"tokens": {"rows": new_rows(model)}} | trainable_parameters(model, learned.learn)
    for part, parameters in targets.items():
        file = Path(folder) / f"{part}.safetensors"
        if not parameters:
            continue
        try:
            tensors = load_file(file)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(tensors[name])
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise MifoError(f"{file} is missing or damaged ({error}); learn it again.") from error
    for part in (model.unet, model.text_encoder):
        part.requires_grad_(False).eval()
    return learned
