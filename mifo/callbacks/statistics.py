"""Gradient norm, steps a second and memory."""

import resource
import sys
from time import perf_counter

import torch
from lightning import Callback, Trainer
from torch.optim import Optimizer

from mifo.training.stages import LearningStage, total_norm


class LearningStatistics(Callback):
    """Logs, at the steps that are logged: gradient norm before clipping, learning rate, steps/s and peak GiB.

    Memory is the GPU's peak of this stage, or the process's resident peak without one.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LearningStage) -> None:
        self._since = perf_counter(), trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LearningStage, optimizer: Optimizer
    ) -> None:
        # Reading a value waits for the device, so only at the steps that are logged.
        step = trainer.global_step + 1
        if step % trainer.log_every_n_steps:
            return
        gradients = [
            each.grad for group in optimizer.param_groups for each in group["params"] if each.grad is not None
        ]
        now, (before, start) = perf_counter(), self._since
        self._since = now, step
        values = {
            "gradient_norm": total_norm(gradients),
            "learning_rate": optimizer.param_groups[0]["lr"],
            "steps_per_second": (step - start) / (now - before),
            "peak_gib": _peak_memory(pl_module.device) / 2**30,
        }
        pl_module.log_dict({f"{pl_module.stage}/{name}": float(value) for name, value in values.items()})


def _peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
