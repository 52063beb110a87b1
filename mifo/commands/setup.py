"""The first steps of every task: seeds, device, loggers."""

import logging
import os
import re
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import wandb
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning import seed_everything
from lightning.pytorch.loggers import Logger, WandbLogger
from transformers.utils.logging import disable_progress_bar

from mifo.acceleration.libraries import load_libraries
from mifo.acceleration.repeatable import compute_repeatably
from mifo.config.compose import as_plain
from mifo.config.schema import (
    EvaluateSettings,
    LearnSettings,
    ModelTaskSettings,
    PretrainTaskSettings,
    QualitySettings,
    TaskSettings,
)
from mifo.errors import MifoError, root_cause
from mifo.files import read_text, write_whole
from mifo.tracking.results import define_metrics
from mifo.tracking.trackio_logger import TrackioLogger

if TYPE_CHECKING:  # what imports diffusers
    from mifo.training.memory import Memory

log = logging.getLogger(__name__)


def prepare(settings: TaskSettings) -> torch.device:
    """Seed every generator, set how the hardware is used, and return the device to work on."""
    # silence Lightning's hints and handler, and the progress bar of transformers for each file
    lightning_log = logging.getLogger("lightning.pytorch")
    lightning_log.setLevel(logging.WARNING)
    lightning_log.handlers.clear()
    for hint in (".*LeafSpec", "The `srun` command"):
        warnings.filterwarnings("ignore", message=hint)
    disable_progress_bar()
    seed_everything(settings.seed, verbose=False)
    if isinstance(settings, ModelTaskSettings | QualitySettings):
        torch.set_float32_matmul_precision(settings.performance.matmul_precision)
        compute_repeatably(settings.performance.deterministic)
        if settings.performance.threads:
            torch.set_num_threads(settings.performance.threads)
    device = device_of(settings)
    if isinstance(settings, ModelTaskSettings | QualitySettings):
        load_libraries(device)
        import_module("diffusers.utils.logging").disable_progress_bar()  # tasks without a model import none
    return device


def device_of(settings: TaskSettings) -> torch.device:
    """The device that `device=auto|cpu|cuda` means on this machine."""
    gpu = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if gpu else "cpu")


@contextmanager
def open_loggers(settings: LearnSettings | EvaluateSettings | PretrainTaskSettings) -> Iterator[list[Logger]]:
    """The loggers of the configuration; a Weights & Biases run is closed with the exit code of the block.

    A run that is continued in its folder goes on in the same run on the server, or offline in a further file.
    If no server answers, the run is kept offline.

    Raises:
        MifoError: a logger does not take its arguments.
    """
    if not has_wandb_key():
        os.environ.setdefault("WANDB_MODE", "offline")
    facts = as_plain(settings)
    facts |= facts.pop("origin")
    active: list[Logger] = []
    failed = True
    try:
        for name, node in settings.logger.items():
            active.append(open_logger(name, node, Path(settings.paths.output), facts))
        yield active
        failed = False
    finally:
        for logger in active:
            logger.finalize("failed" if failed else "success")
            if isinstance(logger, TrackioLogger):
                logger.close()
        # an open run would be handed to the next job of this process
        if wandb.run is not None:
            wandb.finish(exit_code=int(failed))


def open_logger(name: str, node: dict[str, Any], folder: Path, facts: dict[str, Any]) -> Logger:
    """One logger of what is done in `folder`, which knows the `facts` of it."""

    def opened(**own: str) -> Logger:
        logger = instantiate(node, **own)
        logger.log_hyperparams(facts)  # which begins a run of Weights & Biases
        return logger

    try:
        if get_class(node["_target_"]) is not WandbLogger:
            return opened()
        known = folder / "wandb_id.txt"
        own = {"id": read_text(known).strip() if known.is_file() else secrets.token_hex(4)}
        if not re.fullmatch(r"[\w-]{1,64}", own["id"], re.ASCII):
            raise MifoError(f"{known} is damaged: it holds no id of a run; delete it to begin a new one")
        try:
            logger = opened(**own)
        except wandb.errors.Error as error:
            log.warning(
                "Weights & Biases does not answer (%s): this run is kept offline; wandb sync sends it later.",
                " ".join(str(error).split()),
            )
            logger = opened(**own, mode="offline")
        write_whole(known, own["id"])
        parts = list(folder.glob("wandb/offline-run-*/*.wandb"))
        if logger.experiment.offline and len(parts) > 1:
            # nobody tells an offline run its last step; the parts before have more bytes than steps
            logger.experiment.log({}, step=sum(part.stat().st_size for part in parts))
        define_metrics(logger)
        return logger
    except (InstantiationException, TypeError) as error:
        raise MifoError(f"logger.{name} does not take its arguments: {root_cause(error)}") from error


def tell_memory(needed: "Memory", device: torch.device) -> str:
    """A line about the memory of a GPU that is needed; a warning where more is needed than free."""
    told = f"about {needed.total / 2**30:.1f} GiB of a GPU's memory ({needed})"
    if device.type == "cpu":
        return f"{told}; no GPU is in use here"
    free = torch.cuda.mem_get_info()[0]
    if needed.total > free:
        log.warning(
            "This needs %s, of which %.1f GiB are free; end what else uses the GPU, or take "
            "performance=low_vram or performance.gradient_checkpointing=true.",
            told,
            free / 2**30,
        )
    return f"{told}; {free / 2**30:.1f} GiB are free"


def has_wandb_key() -> bool:
    """Whether a key of Weights & Biases is known. Asking wandb would fix its mode for the whole process."""
    try:
        hosts = netrc().hosts
    except (OSError, NetrcParseError):
        hosts = {}
    return "WANDB_API_KEY" in os.environ or any("wandb" in host for host in hosts)
