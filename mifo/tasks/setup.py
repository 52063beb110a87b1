"""What every task does first: seeds, device, loggers."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from netrc import NetrcParseError, netrc

import torch
import wandb
from hydra.utils import instantiate
from lightning import seed_everything
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import OmegaConf
from transformers.utils.logging import disable_progress_bar

from mifo.config.schema import EvaluateSettings, ModelTaskSettings, TaskSettings
from mifo.performance.libraries import load_libraries
from mifo.performance.profile import compute_repeatably
from mifo.tasks.tracking import define_metrics


def prepare(settings: TaskSettings) -> torch.device:
    """Seed every generator, set how the hardware is used, and return the device to work on."""
    # Lightning adds hints and a handler of its own, transformers a bar for each file: MIFO says what it does
    lightning_log = logging.getLogger("lightning.pytorch")
    lightning_log.setLevel(logging.WARNING)
    lightning_log.handlers.clear()
    warnings.filterwarnings("ignore", message=".*LeafSpec")
    disable_progress_bar()
    seed_everything(settings.seed, verbose=False)
    if isinstance(settings, ModelTaskSettings):
        torch.set_float32_matmul_precision(settings.performance.matmul_precision)
        compute_repeatably(settings.performance.deterministic)
        if settings.performance.threads:
            torch.set_num_threads(settings.performance.threads)
    gpu = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if gpu else "cpu")
    if isinstance(settings, ModelTaskSettings):
        load_libraries(device)
    return device


@contextmanager
def open_loggers(settings: ModelTaskSettings | EvaluateSettings) -> Iterator[list[Logger]]:
    """The loggers of the configuration; a Weights & Biases run is closed with the exit code of the block."""
    if not has_wandb_key():
        os.environ.setdefault("WANDB_MODE", "offline")
    active = [instantiate(logger) for logger in settings.logger.values()]
    failed = True
    try:
        for logger in active:
            logger.log_hyperparams(OmegaConf.to_container(OmegaConf.structured(settings), enum_to_str=True))
            if isinstance(logger, WandbLogger):
                define_metrics(logger)
        yield active
        failed = False
    finally:
        for logger in active:
            logger.finalize("failed" if failed else "success")
        # an open run would be handed to the next job of this process
        if wandb.run is not None:
            wandb.finish(exit_code=int(failed))


def has_wandb_key() -> bool:
    """Looked up here, because wandb settles its mode for the whole process once it is asked."""
    try:
        hosts = netrc().hosts
    except (OSError, NetrcParseError):
        hosts = {}
    return "WANDB_API_KEY" in os.environ or any("wandb" in host for host in hosts)
