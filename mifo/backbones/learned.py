"""Saving what was learned apart from the base model, and putting it back on top of it.

A folder `learned/` holds

    learned.json                what it is: base model, tokens, class names, stages, checksums of all others
    tokens.safetensors          the new token rows
    unet.safetensors            the denoiser's weights that learned, if any; transformer.safetensors of others
    text_encoder.safetensors    the text encoder's weights that learned, if any
    config.yaml                 the configuration of the run
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast, get_args

import torch

from mifo.backbones.model import ORIGIN, DiffusionModel, Trainable
from mifo.errors import MifoError
from mifo.files import CONFIG, as_record, checksum, read_json, refuse_existing, whole_folder
from mifo.method.prompts.instances import instance_tokens
from mifo.tensors import read_tensors, write_tensors

FORMAT = 1
ROWS = "tokens.safetensors"
MOST_RANK = 4096  # of adapters; wider than any layer of Stable Diffusion


@dataclass(frozen=True)
class Learned:
    """What `learned.json` says.

    Attributes:
        stages: the steps that each stage took, by its name.
        checksums: SHA-256 of each other file, by its name; older results lack some.
    """

    tokens: list[str]
    class_names: list[str] | None
    initializers: list[str | None] | None
    stages: dict[str, int]
    trainable: str
    lora_rank: int
    base: dict[str, str | None]
    checksums: dict[str, str] = field(default_factory=dict)
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
        MifoError: `folder` exists already, or a number is NaN or infinite, or too large for float16.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    refuse_existing(folder)
    checksums = {}
    with whole_folder(folder) as unfinished:
        for file, parameters in _files(model, trainable).items():
            dtype = torch.float16 if half and file != ROWS else None
            tensors = {name: each.detach().to("cpu", dtype) for name, each in parameters.items()}
            checksums[file] = write_tensors(unfinished / file, tensors)
        (unfinished / CONFIG).write_text(config, encoding="utf-8")
        checksums[CONFIG] = checksum(unfinished / CONFIG)
        learned = Learned(
            tokens=list(model.new_words),
            class_names=None if class_names is None else list(class_names),
            initializers=None if initializers is None else list(initializers),
            stages=dict(stages),
            trainable=trainable,
            lora_rank=lora_rank,
            base=model.identity(),
            checksums=checksums,
        )
        (unfinished / "learned.json").write_text(
            json.dumps(asdict(learned), indent=2) + "\n", encoding="utf-8"
        )
    return learned


def read_learned(folder: Path | str) -> Learned:
    """Read `learned.json`, before any model is loaded, and check that `config.yaml` is what was saved.

    Raises:
        MifoError: `folder` holds no learned result, a damaged one, or one of another format.
    """
    file = Path(folder) / "learned.json"
    if not file.exists():
        raise MifoError(f"{folder} holds no learned result (learned.json); name one that `mifo learn` wrote.")
    content = read_json(file)
    written = content.get("format") if isinstance(content, dict) else FORMAT
    if written != FORMAT:
        raise MifoError(
            f"{folder} has format {written}, this version of MIFO reads {FORMAT}; learn it again."
        )
    if isinstance(content, dict):  # what earlier versions wrote under other names
        if "learn" in content:
            learn = content.pop("learn")
            content["trainable"] = {"kv": "cross_attention_kv", "unet": "denoiser"}.get(learn, learn)
        if "prediction_type" in content and isinstance(content.get("base"), dict):
            content["base"].setdefault("prediction_type", content.pop("prediction_type"))
    learned = as_record(content, Learned, file)
    count = len(learned.tokens)
    wrong = {
        "tokens": learned.tokens != instance_tokens(count) or not count,
        "class_names": learned.class_names is not None and len(learned.class_names) != count,
        "initializers": learned.initializers is not None and len(learned.initializers) != count,
        "trainable": learned.trainable not in get_args(Trainable),
        "lora_rank": learned.trainable == "lora" and not 1 <= learned.lora_rank <= MOST_RANK,
        "base": not {"name", "source", "revision"} < learned.base.keys()
        or not learned.base.get("fingerprint"),
    }
    for key in wrong:
        if wrong[key]:
            raise MifoError(f"{file} is damaged: {key} holds {str(getattr(learned, key))[:40]}")
    config = file.with_name(CONFIG)
    if CONFIG in learned.checksums and checksum(config) != learned.checksums[CONFIG]:
        raise MifoError(f"{config} is damaged: its checksum is another")
    return learned


def load_learned(folder: Path | str, model: DiffusionModel, first: int | None = None) -> Learned:
    """Put a learned result on top of the base model that it belongs to, in place.

    Args:
        first: place of the result's first word among the new words that the model has; None: the model has
            none, and learns those of the result.

    Raises:
        MifoError: not a learned result, damaged files, or one that belongs to another base model.
    """
    learned = read_learned(folder)
    _check_base(folder, learned.base, model)
    if first is None:
        model.add_words(learned.tokens)
    if learned.trainable == "lora":
        model.add_lora(learned.lora_rank)
    own = slice(first or 0, (first or 0) + len(learned.tokens))
    for file, found in _files(model, cast(Trainable, learned.trainable)).items():
        parameters = {name: each[own] if file == ROWS else each for name, each in found.items()}
        shapes = {name: each.shape for name, each in parameters.items()}
        tensors = read_tensors(Path(folder) / file, shapes, learned.checksums.get(file))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
    model.freeze()
    return learned


def _check_base(folder: Path | str, recorded: Mapping[str, str | None], model: DiffusionModel) -> None:
    """Refuse to load a learned result on another base model than its own.

    Args:
        folder: of the learned result, for the message.
        recorded: `model.identity()` when the result was saved. A result of an earlier version lacks some
            keys, which are not compared.

    Raises:
        MifoError: naming what differs and both values.
    """
    present = model.identity()
    if recorded["fingerprint"] != present["fingerprint"]:
        raise MifoError(
            f"{folder} was learned on {_told(recorded)}, not on {_told(present)}; load it on that."
        )
    for key, value in present.items():
        if key not in ORIGIN and recorded.get(key, value) != value:
            raise MifoError(
                f"{folder} was learned on {_told(recorded)} with {key}={recorded[key]}, but "
                f"{present['source']} has {key}={value}; put that back, or learn anew."
            )


def _told(base: Mapping[str, str | None]) -> str:
    revision = f" at {base['revision']}" if base["revision"] else ""
    return f"{base['name']} ({base['source']}{revision}, weights {(base['fingerprint'] or '')[:8]})"


def _files(model: DiffusionModel, trainable: Trainable) -> dict[str, dict[str, torch.Tensor]]:
    """What each file of tensors holds, by name."""
    parts = model.trainable(trainable)
    files: dict[str, dict[str, torch.Tensor]] = {
        f"{part}.safetensors": {**parameters} for part, parameters in parts.items() if parameters
    }
    rows: dict[str, torch.Tensor] = {
        "rows" if place == 0 else f"rows.{network}": each
        for place, (network, each) in enumerate(model.new_rows.items())
    }
    return {ROWS: rows, **files}
