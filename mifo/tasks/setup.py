"""What every task does first: seeds, device, loggers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import wandb
from hydra.utils import instantiate
from lightning import seed_everything
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf

from mifo.config.schema import EvaluateSettings, ModelTaskSettings, TaskSettings


def prepare(settings: TaskSettings) -> torch.device:
    """Seed every generator, set how the hardware is used, and return the device to work on."""
    seed_everything(settings.seed, verbose=False)
    if isinstance(settings, ModelTaskSettings):
        torch.set_float32_matmul_precision(settings.performance.matmul_precision)
        if settings.performance.threads:
            torch.set_num_threads(settings.performance.threads)
    gpu = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if gpu else "cpu")


@contextmanager
def open_loggers(settings: ModelTaskSettings | EvaluateSettings) -> Iterator[list[Logger]]:
    """The loggers of the configuration; a Weights & Biases run is closed with the exit code of the block."""
    if "wandb" in settings.logger and not wandb.api.api_key:
        os.environ.setdefault("WANDB_MODE", "offline")
    active = [instantiate(logger) for logger in settings.logger.values()]
    failed = True
    try:
        for logger in active:
            logger.log_hyperparams(OmegaConf.to_container(OmegaConf.structured(settings), enum_to_str=True))
        yield active
        failed = False
    finally:
        for logger in active:
            logger.finalize("failed" if failed else "success")
        # an open run would be handed to the next job of this process
        if wandb.run is not None:
            wandb.finish(exit_code=int(failed))
