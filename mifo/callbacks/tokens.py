"""Where the new words go."""

import torch
from lightning import Callback, Trainer
from torch import Tensor
from torch.nn import functional as F

from mifo.training.stages import LearningStage


class TokenStatistics(Callback):
    """Logs each new row's norm, its drift ‖row − row at the stage's start‖, and the nearest pair's cosine.

    A cosine that rises towards 1 means that two instances become one word.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LearningStage) -> None:
        self._start = _rows(pl_module)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LearningStage, outputs, batch, batch_index: int
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps:
            return
        rows = _rows(pl_module)
        values = {}
        for token, row, start in zip(pl_module.instances.tokens, rows, self._start, strict=True):
            values[f"norm/{token}"] = row.norm()
            values[f"drift/{token}"] = (row - start).norm()
        if len(rows) > 1:
            cosines = F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).T
            values["nearest_pair_cosine"] = cosines.fill_diagonal_(-1).max()
        pl_module.log_dict({f"{pl_module.stage}/tokens/{name}": value for name, value in values.items()})


def _rows(module: LearningStage) -> Tensor:
    """The new rows of all text encoders side by side, (N, sum of widths), as they are now."""
    return torch.cat([rows.detach() for rows in module.model.new_rows.values()], dim=1).clone()
