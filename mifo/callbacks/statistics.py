"""Gradient norm, steps a second and memory."""

from time import perf_counter

import torch
from lightning import Callback, Trainer
from torch.optim import Optimizer

from mifo.training.memory import peak_memory
from mifo.training.stages import LearningStage


class LearningStatistics(Callback):
    """Logs, at the steps that are logged: gradient norm before clipping, learning rate, steps/s and peak GiB.

    The norm is missing where gradients are not clipped or float16 scales them, see `LearningStage`.
    Memory is the GPU's peak of this stage, or the process's resident peak without one.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LearningStage) -> None:
        self._since = perf_counter(), trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LearningStage, optimizer: Optimizer
    ) -> None:
        self._rate = optimizer.param_groups[0]["lr"]  # the scheduler changes it before the batch ends

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LearningStage, outputs, batch, batch_index: int
    ) -> None:
        # reading a value waits for the device, so only at the steps that are logged
        step = trainer.global_step
        if step % trainer.log_every_n_steps:
            return
        now, (before, start) = perf_counter(), self._since
        self._since = now, step
        values = {
            "learning_rate": self._rate,
            "steps_per_second": (step - start) / (now - before),
            "peak_gib": peak_memory(pl_module.device) / 2**30,
        }
        if pl_module.gradient_norm is not None:
            values["gradient_norm"] = pl_module.gradient_norm
        pl_module.log_dict({f"{pl_module.stage}/{name}": float(value) for name, value in values.items()})
