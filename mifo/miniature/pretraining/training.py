"""What the parts share: steps as a data set, cosine learning rate, averaged weights, checkpoints."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from mifo.miniature.pretraining.settings import PartSettings


class Steps(Dataset):
    """The numbers 0 … n−1: each part draws its own batch on the device, seeded by the step."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


class Pretraining(L.LightningModule):
    """One part: ``network`` learns by ``loss(generator)``; ``average`` holds its exponential average.

    ``part`` is its name, also the prefix of what is logged.
    """

    part: str
    network: Any  # whose methods its own part knows

    def __init__(self, network: nn.Module, settings: PartSettings, seed: int) -> None:
        super().__init__()
        self.network = network
        self.settings = settings
        self.seed = seed
        decay = settings.average_decay
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    def loss(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss of one batch as named parts; ``loss`` is the one that is minimised."""
        raise NotImplementedError

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        step_seed = self.seed * 1_000_003 + self.global_step
        parts = self.loss(torch.Generator(self.device).manual_seed(step_seed))
        self.log_dict({f"{self.part}/{name}": value.detach() for name, value in parts.items()}, prog_bar=True)
        return parts["loss"]

    def on_train_batch_end(self, outputs, batch, batch_index: int) -> None:
        self.average.update_parameters(self.network)

    def parameter_groups(self) -> list[dict]:
        """Weights decay, biases and norms do not."""
        decayed = [p for p in self.network.parameters() if p.requires_grad and p.ndim > 1]
        plain = [p for p in self.network.parameters() if p.requires_grad and p.ndim <= 1]
        return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(
            self.parameter_groups(), lr=self.settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2
        )
        warmup, steps = self.settings.warmup_steps, self.settings.steps

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.02 + 0.98 * 0.5 * (
                1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))
            )

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(module: Pretraining, folder: Path, minutes: float | None = None, logger=True) -> bool:
    """Train ``module`` to its number of steps, from ``folder``/last.ckpt on; → whether it is finished.

    After ``minutes`` it stops with a checkpoint, from which the next call goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last.ckpt"
    cuda = torch.cuda.is_available()
    trainer = L.Trainer(
        max_steps=module.settings.steps,
        max_time=timedelta(minutes=minutes) if minutes else None,
        accelerator="gpu" if cuda else "cpu",
        devices=1,
        precision="bf16-mixed" if cuda else "32-true",
        gradient_clip_val=1.0,
        logger=logger,
        log_every_n_steps=100,
        default_root_dir=folder,
        callbacks=[
            RichProgressBar(refresh_rate=50),
            ModelCheckpoint(folder, filename="{step}", save_last=True, every_n_train_steps=1000),
        ],
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Steps(module.settings.steps)), ckpt_path=last if last.exists() else None)
    trainer.save_checkpoint(last)
    return module.global_step >= module.settings.steps
