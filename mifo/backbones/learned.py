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
from torch import nn

from mifo.backbones.model import DiffusionModel, Trainable
from mifo.errors import MifoError

FORMAT = 1


@dataclass(frozen=True)
class Learned:
    """What `learned.json` says. `stages` maps the name of a stage to the steps it took."""

    tokens: list[str]
    class_names: list[str] | None
    initializers: list[str | None] | None
    stages: dict[str, int]
    trainable: str
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
    trainable: Trainable,
    lora_rank: int,
    half: bool = False,
    config: str = "",
) -> Learned:
    """Write the new token rows and the weights that `trainable` names into the new folder `folder`.

    The folder appears whole or not at all.

    Args:
        trainable: see `DiffusionModel.trainable`; "tokens" saves nothing but the rows.
        half: round the weights, not the rows, to float16.
        config: YAML text of the run's configuration.

    Raises:
        MifoError: `folder` exists already.
    """
    folder = Path(folder)
    refuse_existing(folder)
    learned = Learned(
        tokens=list(model.new_words),
        class_names=None if class_names is None else list(class_names),
        initializers=None if initializers is None else list(initializers),
        stages=dict(stages),
        trainable=trainable,
        lora_rank=lora_rank,
        base=_base(model),
        prediction_type=str(model.identity()["prediction_type"]),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}") as unfinished:
        target = Path(unfinished) / folder.name
        target.mkdir()
        save_file(
            {name: rows.detach().float().cpu() for name, rows in _named_rows(model).items()},
            target / "tokens.safetensors",
        )
        for part, parameters in model.trainable(trainable).items():
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
    if "learn" in content:  # of before the house was rebuilt
        learn = content.pop("learn")
        content["trainable"] = {"kv": "cross_attention_kv", "unet": "denoiser"}.get(learn, learn)
    return Learned(**content)


def load_learned(folder: Path | str, model: DiffusionModel) -> Learned:
    """Put a learned result on top of the base model that it belongs to, in place.

    Raises:
        MifoError: not a learned result, damaged files, or one that belongs to another base model.
    """
    learned = read_learned(folder)
    if learned.base["fingerprint"] != model.fingerprint:
        raise MifoError(
            f"{folder} was learned on {_told(learned.base)}, not on {_told(_base(model))}; load it on that."
        )
    model.add_words(learned.tokens)
    if learned.trainable == "lora":
        model.add_lora(learned.lora_rank)
    targets = {"tokens": _named_rows(model)} | model.trainable(learned.trainable)
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
    model.freeze()
    return learned


def _named_rows(model: DiffusionModel) -> dict[str, nn.Parameter]:
    """The new rows as `tokens.safetensors` names them: those of the first text encoder are "rows"."""
    return {
        "rows" if place == 0 else f"rows.{network}": rows
        for place, (network, rows) in enumerate(model.new_rows.items())
    }


def _base(model: DiffusionModel) -> dict[str, str | None]:
    return {key: getattr(model, key) for key in ("name", "source", "revision", "fingerprint")}


def _told(base: Mapping[str, str | None]) -> str:
    revision = f" at {base['revision']}" if base["revision"] else ""
    return f"{base['name']} ({base['source']}{revision}, weights {base['fingerprint'][:8]})"
