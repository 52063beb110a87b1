"""The two stages of learning as LightningModules: what learns, with which optimiser, on which loss."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from typing import Any, Self

import lightning
import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch import Tensor, nn
from torch.func import functional_call

from mifo.attention.layers import choose_layers
from mifo.attention.recording import AttentionRecorder
from mifo.data.instances import InstanceSet
from mifo.data.learning_data import LearningBatch
from mifo.diffusion.noise_schedule import NoiseSchedule
from mifo.learning.objective import LossParts, StepInputs, finetuning_loss, semantic_loss
from mifo.learning.settings import StageSettings
from mifo.models.loading import DiffusionModel
from mifo.models.text import encode_ids
from mifo.models.trainable import new_rows, set_trainable
from mifo.penalty.active import Stage, active_term, layers_read
from mifo.penalty.settings import PenaltySettings, TermSettings
from mifo.performance.graphs import GraphedStep

OPTIMIZERS = ("adamw", "adamw_8bit")
SCHEDULES = tuple(schedule.value for schedule in SchedulerType)

log = logging.getLogger(__name__)


class LearningStage(lightning.LightningModule):
    """One stage. Checkpoints hold what learns, the optimiser and nothing of the base model.

    Attributes:
        model, instances, settings, penalty: as given.
        stage: "semantic" or "finetuning", also the prefix of what is logged.
        last: the `LossParts` of the last step, or None; reading its values waits for the device.
        new_rows: the new token rows, (N, width).
        layers: index of each attention layer that the loss of the stage may read.
    """

    stage: Stage

    def __init__(
        self,
        model: DiffusionModel,
        instances: InstanceSet,
        settings: StageSettings,
        penalty: PenaltySettings,
        prior_weight: float = 0.0,
        graphs: bool = False,
    ) -> None:
        """With `graphs` a step is replayed as a CUDA graph; that needs a GPU of NVIDIA."""
        super().__init__()
        self.strict_loading = False  # the base model is not in a checkpoint
        self.model = model
        self.unet, self.text_encoder = model.unet, model.text_encoder
        self.instances, self.settings, self.penalty = instances, settings, penalty
        self.prior_weight = prior_weight
        self.last: LossParts | None = None
        self._graphs = graphs
        self._steps: dict[str, GraphedStep] = {}  # that of the active loss
        self._choice = choose_layers(model.unet)
        self._recorder = AttentionRecorder(model.unet, self._layers_at(0))
        set_trainable(model, settings.learn)
        self.train()

    @property
    def new_rows(self) -> nn.Parameter:
        return new_rows(self.model)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({*self._layers_at(0), *self._layers_at(self.settings.steps)}))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Attention is recorded in this block, in which the trainer must run, and put back after it.

        Graphs and gradients end with the block too.
        """
        self._recorder.__enter__()
        try:
            yield
        finally:
            self._recorder.__exit__(None, None, None)
            self._steps.clear()
            self.zero_grad()

    def training_step(self, batch: LearningBatch, batch_index: int) -> Tensor:
        term = active_term(self.penalty, self.stage, self.global_step)
        self._record(self._layers_at(self.global_step))
        if repr(term) not in self._steps:
            # the old one goes first, with the memory of its graph
            self._steps.clear()
            parameters = [each for each in self.parameters() if each.requires_grad]
            self._steps[repr(term)] = GraphedStep(_Step(self, term), parameters, self._graphs)
        total, (parts, maps) = self._steps[repr(term)](*_tensors(batch))
        self.last = LossParts(total.detach(), **parts, maps=maps)
        # values are read, which waits for the device, only at the steps that are logged
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            parts = {"total": self.last.total, **parts}
            self.log_dict({f"{self.stage}/loss/{name}": value for name, value in parts.items()})
        return total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """As of any module, but a graphed step has its gradients already."""
        (step,) = self._steps.values()
        step.backward(loss)

    def eager_step(self, batch: LearningBatch) -> Tensor:
        """The loss of the first step's kind without a graph, for counting its operations."""
        self._record(self._layers_at(0))
        term = active_term(self.penalty, self.stage, 0)
        with self.trainer.precision_plugin.forward_context():
            return _Step(self, term)(*_tensors(batch))[0]

    def on_fit_start(self) -> None:
        self._schedule = NoiseSchedule.from_scheduler(self.model.noise_scheduler, self.device)
        # what Lightning or PyTorch does to gradients on their way would be left out of a graph
        reasons = {
            "float16 scales the gradients": self.trainer.precision == "16-mixed",
            "gradients add up over several batches": self.trainer.accumulate_grad_batches > 1,
            "several processes share their gradients": self.trainer.world_size > 1,
        }
        if self._graphs and any(reasons.values()):
            self._graphs = False
            log.warning("Learning goes on without CUDA graphs, since %s.", max(reasons, key=reasons.get))

    def configure_optimizers(self) -> dict[str, Any]:
        settings = self.settings
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer_class = _optimizer_class(settings.optimizer, self.device)
        # one kernel for all parameters, which would have to unscale the gradients of float16 by itself
        fused = self.device.type in ("cuda", "cpu") and self.trainer.precision != "16-mixed"
        optimizer = optimizer_class(
            parameters,
            **({"fused": True} if fused and optimizer_class is torch.optim.AdamW else {}),
            lr=settings.learning_rate,
            betas=tuple(settings.betas),
            weight_decay=settings.weight_decay,
            eps=settings.eps,
        )
        schedule = get_scheduler(
            settings.schedule,
            optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=settings.steps,
            num_cycles=1,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By the norm; Lightning itself refuses fused optimisers, also where no gradient is scaled."""
        if not gradient_clip_val:
            return
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        if optimizer.defaults.get("fused"):
            # divides the gradients as it reads them, which spares a pass over them; also GradScaler's way
            optimizer.grad_scale = ((norm + 1e-6) / gradient_clip_val).clamp(min=1)
        else:
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def on_train_end(self) -> None:
        # after which Lightning would carry the optimiser's states to the processor
        self.trainer.strategy.optimizers = []

    def cpu(self) -> Self:
        """Stay where it is, as Lightning calls this at the end: the model is used on its device next."""
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Only what learns."""
        return {name: each.detach() for name, each in self.named_parameters() if each.requires_grad}

    def loss(self, unet: Callable[..., Any], inputs: StepInputs, term: TermSettings) -> LossParts:
        """The loss of the stage with the attention loss that is active, on this U-Net or what wraps it."""
        raise NotImplementedError

    def _layers_at(self, step: int) -> tuple[int, ...]:
        return layers_read(active_term(self.penalty, self.stage, step).term, self.stage, self._choice)

    def _record(self, layers: tuple[int, ...]) -> None:
        """Turn to other layers where the active loss reads others."""
        if layers != self._recorder.layers:
            self._recorder.__exit__(None, None, None)
            self._recorder = AttentionRecorder(self.unet, layers)
            self._recorder.__enter__()


class SemanticLearning(LearningStage):
    """Stage 1, semantic learning: the new token rows (MIFO, arXiv 2511.00542)."""

    stage = "semantic"

    def loss(self, unet: Callable[..., Any], inputs: StepInputs, term: TermSettings) -> LossParts:
        limit = self.penalty.timestep_limit
        return semantic_loss(unet, self._recorder, self._schedule, inputs, term, limit)


class Finetuning(LearningStage):
    """Stage 2, fine-tuning: U-Net, text encoder and the new token rows, with prior preservation."""

    stage = "finetuning"

    def loss(self, unet: Callable[..., Any], inputs: StepInputs, term: TermSettings) -> LossParts:
        limit = self.penalty.timestep_limit
        recorder, schedule = self._recorder, self._schedule
        return finetuning_loss(unet, recorder, schedule, inputs, term, limit, self.prior_weight)


class _Step:
    """The loss of a step as a function of tensors alone, the fields of `LearningBatch`, to be graphed.

    Returns the total, and beside it the detached parts by name and maps by layer.
    """

    def __init__(self, stage: LearningStage, term: TermSettings) -> None:
        text_encoder = _with_rounded_frozen_weights(stage.text_encoder)
        self._encode = partial(encode_ids, stage.model, text_encoder=text_encoder)
        self._loss = partial(stage.loss, _with_rounded_frozen_weights(stage.unet), term=term)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, tuple[dict[str, Tensor], dict[int, Tensor]]]:
        batch = LearningBatch(*tensors)
        inputs = StepInputs(
            latents=batch.latents,
            noise=batch.noise,
            timesteps=batch.timesteps,
            encoder_hidden_states=self._encode(batch.input_ids),
            token_positions=batch.token_positions,
            masks=batch.masks,
            valid=batch.valid,
        )
        loss = self._loss(inputs)
        parts = {name: getattr(loss, name).detach() for name in ("denoising", "prior", "attention")}
        return loss.total, (parts, loss.maps)


def _tensors(batch: LearningBatch) -> list[Tensor]:
    return [getattr(batch, each.name) for each in fields(batch)]


def _with_rounded_frozen_weights(part: nn.Module) -> Callable[..., Any]:
    """U-Net or text encoder with frozen weights in autocast's precision, not rounded anew at each step."""
    device = part.device.type
    if not torch.is_autocast_enabled(device) or part.is_gradient_checkpointing:
        return part
    dtype = torch.get_autocast_dtype(device)
    rounded = {
        f"{name}.{own}": parameter.to(dtype)
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for own, parameter in module.named_parameters(recurse=False)
        if not parameter.requires_grad and parameter.dtype == torch.float32
    }
    if not rounded:
        return part
    return lambda *inputs, **options: functional_call(part, rounded, inputs, options)


def _optimizer_class(name: str, device: torch.device) -> type[torch.optim.Optimizer]:
    """AdamW, with 8-bit states that of bitsandbytes where it and a GPU are at hand, else our own."""
    if name == "adamw":
        return torch.optim.AdamW
    if device.type == "cuda" and find_spec("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit
    else:
        from mifo.performance.adamw_8bit import AdamW8bit
    return AdamW8bit
