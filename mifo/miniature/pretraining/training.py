"""What the parts share: cosine learning rate, averaged weights, checkpoints."""

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, Timer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from mifo.acceleration.graphs import capture
from mifo.miniature.pretraining.settings import PartSettings


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
            done = min(1.0, (step - warmup) / max(1, steps - warmup))
            return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ReplayedPretraining(Pretraining):
    """A part whose step, on a GPU, is replayed as one graph with its gradients, on bf16 copies of weights.

    ``objective`` gives the loss of what ``batch`` draws, as named parts.
    """

    objective: Callable[..., dict[str, Tensor]]

    def __init__(self, network: nn.Module, settings: PartSettings, seed: int) -> None:
        super().__init__(network, settings, seed)
        self._replay: Callable[..., Any] | None = None
        self._gradients: Sequence[Tensor | None] | None = None

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What `objective` takes, drawn anew."""
        raise NotImplementedError

    def loss(self, generator: torch.Generator) -> dict[str, Tensor]:
        batch = self.batch(generator)
        # autocast would keep rounded weights from one step to the next, also inside a graph
        with torch.autocast(self.device.type, enabled=False):
            if self.device.type != "cuda":
                return self.objective(*batch)
            if self._replay is None:
                self._graded(*batch)  # compiles, which a capture must not
                self._replay = capture(self._graded, batch)
            parts, self._gradients = self._replay(*batch)
        return parts

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """A replayed step has its gradients already."""
        if self._gradients is None:
            super().backward(loss, *args, **kwargs)
            return
        for parameter, gradient in zip(self._learned(), self._gradients, strict=True):
            parameter.grad = gradient

    def _learned(self) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def _graded(self, *batch: Tensor) -> tuple[dict[str, Tensor], Sequence[Tensor | None]]:
        """The loss and its gradients, to be replayed as one graph: the GPU need not wait for Python."""
        parts = self.objective(*batch)
        gradients = torch.autograd.grad(parts["loss"], self._learned(), allow_unused=True)
        return {name: value.detach() for name, value in parts.items()}, gradients

    def predict(self, weights: dict[str, Tensor], noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """ε̂ with bf16 copies of the fp32 weights on a GPU: autocast would run every normalisation in fp32."""
        if self.device.type == "cuda":
            weights = {name: weight.bfloat16() for name, weight in weights.items()}
            noisy = noisy.bfloat16()
        return torch.func.functional_call(self.network, weights, (noisy, timesteps, ids))


class Minutes(Timer):
    """The time of one call; Lightning's own counts the time before a checkpoint too, and stops at once."""

    def state_dict(self) -> dict[str, Any]:
        return {}


def fit(
    module: Pretraining, folder: Path, device: torch.device, minutes: float | None = None, logger=True
) -> bool:
    """Train ``module`` to its number of steps, from ``folder``/last.ckpt on; → whether it is finished.

    After ``minutes`` it stops with a checkpoint, from which the next call goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last.ckpt"
    cuda = device.type == "cuda"
    trainer = L.Trainer(
        max_steps=module.settings.steps,
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
            *([Minutes(timedelta(minutes=minutes))] if minutes is not None else []),
        ],
        enable_model_summary=False,
    )
    # each part draws its own batch on the device, seeded by the step
    steps: Any = range(module.settings.steps)
    trainer.fit(module, DataLoader(steps), ckpt_path=last if last.exists() else None)
    trainer.save_checkpoint(last)
    return module.global_step >= module.settings.steps
