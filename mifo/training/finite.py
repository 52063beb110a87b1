"""Learning ends at the first number that is not finite."""

import math
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from mifo.errors import MifoError
from mifo.tensors import not_finite
from mifo.training.stages import LearningStage

_READ = ("denoising loss", "prior loss", "attention loss", "gradient norm")
_MOST_STEPS = 100  # between two readings


class FiniteNumbers(Callback):
    """Ends learning at the first loss, gradient norm or weight that is NaN or infinite.

    Losses and norms are kept on their device and read, which waits for the device, at the steps that are
    logged, before a checkpoint is written and at the end of a stage; on a CPU at each step. The weights are
    read before a checkpoint and at the end, on a CPU with the losses: on a GPU a reading of all weights takes
    as long as two steps.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[int, Tensor]] = []  # (step, its losses and gradient norm (4,))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LearningStage, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        last, norm, step = pl_module.last, pl_module.gradient_norm, trainer.global_step
        assert last is not None  # a step has been taken
        norm = torch.zeros_like(last.total) if norm is None else norm
        self._kept.append((step, torch.stack([last.denoising, last.prior, last.attention, norm])))
        if step % _interval(trainer, pl_module) == 0:
            self._check(trainer, pl_module, weights=pl_module.device.type == "cpu")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LearningStage, checkpoint: dict[str, Any]
    ) -> None:
        self._check(trainer, pl_module)
        if bad := not_finite(checkpoint["optimizer_states"]):
            raise _refusal(pl_module, trainer.global_step, f"state {bad} of the optimizer is not finite")

    def on_train_end(self, trainer: Trainer, pl_module: LearningStage) -> None:
        self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, module: LearningStage, weights: bool = True) -> None:
        """Refuse kept numbers that are not finite, and such weights if `weights` says so."""
        kept, self._kept = self._kept, []
        values = torch.stack([parts for _, parts in kept]).tolist() if kept else []
        for (step, _), row in zip(kept, values, strict=True):
            for name, value in zip(_READ, row, strict=True):
                if not math.isfinite(value):
                    raise _refusal(module, step, f"{name} is {value}")
        if weights and (bad := not_finite(module.state_dict())):
            raise _refusal(module, trainer.global_step, f"weight {bad} is not finite")


def _interval(trainer: Trainer, module: LearningStage) -> int:
    """Steps between two readings."""
    return 1 if module.device.type == "cpu" else max(1, min(trainer.log_every_n_steps, _MOST_STEPS))


def _refusal(module: LearningStage, step: int, found: str) -> MifoError:
    rate = f"learning.{module.stage}.learning_rate={module.settings.learning_rate:g}"
    return MifoError(
        f"learning stopped in stage {module.stage} at step {step}: its {found}, with {rate}; take a smaller "
        "learning rate"
    )
