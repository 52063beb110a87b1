"""Checkpoints that survive kills, full disks and damage."""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from mifo.acceleration.adamw_8bit import MOMENTS
from mifo.errors import MifoError
from mifo.files import reason, regular_file, whole_file
from mifo.tensors import difference, not_finite

NEWEST, PREVIOUS = "last.ckpt", "previous.ckpt"
_TENSORS = ("state_dict", "optimizer_states")
# the functions with which Lightning restores a checkpoint
_RESTORING = ("resume_start", "_restore_modules_and_callbacks", "restore_training_state")
_DIGEST = hashlib.sha256().digest_size

log = logging.getLogger(__name__)


class WholeCheckpoints(CheckpointIO):
    """Writes checkpoints whole, each with its SHA-256 as the last 32 bytes, and keeps the one before.

    Each stage has a folder with `last.ckpt` and `previous.ckpt`. `torch.load` reads both as they are.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any | None = None
    ) -> None:
        """Write the newest checkpoint; at no time are there more than two.

        Raises:
            MifoError: the disk is full or cannot be written to; the newest checkpoint stays.
        """
        path = Path(path)
        previous = path.with_name(PREVIOUS)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as unfinished:
                previous.unlink(missing_ok=True)
                with open(unfinished, "w+b") as file:
                    torch.save(checkpoint, file)
                    file.seek(0)
                    file.write(hashlib.file_digest(file, "sha256").digest())
                if path.exists():
                    path.replace(previous)
        except (OSError, RuntimeError) as error:
            # torch raises another error while it closes the file, which hides the error of the system
            told = error if isinstance(error, OSError) else error.__context__
            if not isinstance(told, OSError):
                raise
            raise MifoError(
                f"{path} cannot be written ({reason(told)}); make room and go on with "
                f"resume={path.parents[2]}, from the last checkpoint"
            ) from error

    def load_checkpoint(
        self, path: Path | str, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The newest whole checkpoint in the folder of `path`, on the CPU; it is the newest from now on."""
        newest = Path(path)
        previous = newest.with_name(PREVIOUS)
        damage = None
        for file in (newest, previous):
            if not os.path.lexists(file):
                continue
            try:
                checkpoint = _read(file)
            except MifoError as error:
                damage = error
                continue
            if damage:
                log.warning("%s; learning goes on from the checkpoint before.", damage)
            if file is previous:
                try:
                    previous.replace(newest)
                except OSError as error:  # a folder has its name
                    raise MifoError(f"{newest} cannot be replaced ({reason(error)}); move it away") from error
            return checkpoint
        raise MifoError(f"{damage}; delete the folder {newest.parent}, and its stage begins anew")

    def remove_checkpoint(self, path: Path | str) -> None:
        Path(path).unlink(missing_ok=True)


class SaveCheckpoints(Callback):
    """Saves a checkpoint to `file` after every `every` steps."""

    def __init__(self, file: Path, every: int) -> None:
        self.file, self.every = file, every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            trainer.save_checkpoint(self.file)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint from which this folder's stage goes on; None: the stage begins."""
    found = any(os.path.lexists(folder / name) for name in (NEWEST, PREVIOUS))
    return folder / NEWEST if found else None


def check_checkpoint(checkpoint: Mapping[str, Any], learning: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint whose weights, or optimiser states, do not belong to the weights that learn.

    `learning` has these weights by name, in the order in which the optimiser has them.
    """
    expected = {name: each.shape for name, each in learning.items()}
    try:
        found, states = checkpoint["state_dict"], checkpoint["optimizer_states"][0]["state"]
        wrong = difference({name: each.shape for name, each in found.items()}, expected)
        for number, (name, each) in enumerate(learning.items()):
            if wrong:
                break
            if found[name].dtype != each.dtype:
                wrong = f"{name} has the precision {found[name].dtype}, not {each.dtype}"
            # weights without gradients have no state yet, and other optimisers name their moments otherwise
            elif any(
                key in MOMENTS and state.shape != each.shape for key, state in states.get(number, {}).items()
            ):
                wrong = f"the moments of {name} have another shape"
    except (AttributeError, LookupError, TypeError) as error:
        wrong = f"it is damaged ({error})"
    if wrong:
        raise MifoError(f"the checkpoint of this run does not fit: {wrong}; start the run in another folder")


@contextmanager
def refusing_odd(checkpoint: Path | None) -> Iterator[None]:
    """Turn what Lightning raises while it restores `checkpoint` into a sentence.

    A checkpoint with the right checksum may still hold states that Lightning did not save.
    """
    try:
        yield
    except MifoError:
        raise
    except Exception as error:
        frames = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
        if checkpoint is None or not any(code.co_name in _RESTORING for code in frames):
            raise
        raise MifoError(
            f"{checkpoint} is damaged: its states do not fit ({reason(error)}); delete the folder "
            f"{checkpoint.parent}, and its stage begins anew"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint of `WholeCheckpoints` whose every byte and number is as it was written."""
    with regular_file(path) as file:
        rest, sha256 = os.fstat(file.fileno()).st_size - _DIGEST, hashlib.sha256()
        while rest > 0 and (part := file.read(min(rest, 2**20))):
            sha256.update(part)
            rest -= len(part)
        if file.read() != sha256.digest():
            raise MifoError(f"{path} is damaged: its checksum is another")
        file.seek(0)
        try:
            checkpoint = torch.load(file, "cpu", weights_only=True)
        except Exception as error:  # of pickle, of zip, of torch
            raise MifoError(f"{path} is damaged: {type(error).__name__}") from error
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= {*_TENSORS}:
        raise MifoError(f"{path} is damaged: it is no checkpoint of learning")
    if bad := not_finite([checkpoint[name] for name in _TENSORS]):
        raise MifoError(f"{path} is damaged: {bad} is not finite")
    return checkpoint
