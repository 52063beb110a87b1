"""The two stages of learning as LightningModules: what learns, with which optimiser, on which loss."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, Self

import lightning
import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch import Tensor, nn

from mifo.attention.layers import choose_layers
from mifo.attention.recording import AttentionRecorder
from mifo.data.instances import InstanceSet
from mifo.data.learning_data import LearningBatch
from mifo.diffusion.noise_schedule import NoiseSchedule
from mifo.learning.checkpoints import check_checkpoint
from mifo.learning.objective import LossParts, StepInputs, finetuning_loss, semantic_loss
from mifo.learning.settings import StageSettings
from mifo.models.loading import DiffusionModel
from mifo.models.text import encode_ids
from mifo.models.trainable import new_rows, set_trainable
from mifo.penalty.active import Stage, active_term, layers_read
from mifo.penalty.settings import PenaltySettings, TermSettings
from mifo.performance.adamw_8bit import AdamW8bit
from mifo.performance.graphs import GraphedStep, take_gradients_in
from mifo.performance.rounding import RoundedWeights, every_weight, frozen_products

OPTIMIZERS = ("adamw", "adamw_8bit")
SCHEDULES = tuple(schedule.value for schedule in SchedulerType)

log = logging.getLogger(__name__)


class LearningStage(lightning.LightningModule):
    """One stage. Checkpoints hold what learns, the optimiser and nothing of the base model.

    Attributes:
        model, instances, settings, penalty: as given.
        stage: "semantic" or "finetuning", also the prefix of what is logged.
        last: the `LossParts` of the last step, or None; reading its values waits for the device.
        gradient_norm: of the last step before clipping, a scalar; None where it is not clipped, or where
            float16 scales the gradients, which may overflow and are then left out.
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
        passes_in: torch.dtype | None = None,
    ) -> None:
        """With `graphs` a step is replayed as a CUDA graph; that needs a GPU of NVIDIA.

        With `passes_in` a step runs wholly in that precision, on copies of the weights, without autocast.
        """
        super().__init__()
        self.strict_loading = False  # the base model is not in a checkpoint
        self.model = model
        self.unet, self.text_encoder = model.unet, model.text_encoder
        self.instances, self.settings, self.penalty = instances, settings, penalty
        self.prior_weight = prior_weight
        self.last: LossParts | None = None
        self.gradient_norm: Tensor | None = None
        self.passes_in = passes_in
        self._graphs = graphs
        self._copies: dict[nn.Parameter, Tensor] = {}  # of what learns, as the passes read it
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
            for parameter in self._copies:
                take_gradients_in(parameter, parameter.dtype)
            self._copies = {}

    def training_step(self, batch: LearningBatch, batch_index: int) -> Tensor:
        term = active_term(self.penalty, self.stage, self.global_step)
        self._record(self._layers_at(self.global_step))
        if repr(term) not in self._steps:
            # the old one goes first, with the memory of its graph
            self._steps.clear()
            step = _Step(self, term)
            self._learn_on(step.copies)
            parameters = [each for each in self.parameters() if each.requires_grad]
            self._steps[repr(term)] = GraphedStep(step, parameters, self._graphs, step.copies)
        total, (parts, maps) = self._steps[repr(term)](*_tensors(batch))
        self.last = LossParts(total.detach(), **parts, maps=maps)
        # values are read, which waits for the device, only at the steps that are logged
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            parts = {"total": self.last.total, **parts}
            self.log_dict({f"{self.stage}/loss/{name}": value for name, value in parts.items()})
        return total

    def _learn_on(self, copies: dict[nn.Parameter, Tensor]) -> None:
        """Passes read these copies: each optimiser step brings them up to date."""
        self._copies = copies
        optimizer = self.optimizers(use_pl_optimizer=False)
        if isinstance(optimizer, AdamW8bit):
            optimizer.copies = copies
            for parameter, copy in copies.items():
                take_gradients_in(parameter, copy.dtype)

    def optimizer_step(self, epoch: int, batch_index: int, optimizer: Any, closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_index, optimizer, closure)
        if self._copies and not isinstance(self.optimizers(use_pl_optimizer=False), AdamW8bit):
            with torch.no_grad():
                torch._foreach_copy_(list(self._copies.values()), list(self._copies))

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
        optimizer_class = _optimizer_class(settings.optimizer)
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
        norm = total_norm([each.grad for each in parameters if each.grad is not None])
        self.gradient_norm = None if self.trainer.precision == "16-mixed" else norm
        if optimizer.defaults.get("fused") or isinstance(optimizer, AdamW8bit):
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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_checkpoint(checkpoint, self.state_dict())

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

    Attributes:
        copies: of weights that learn, in the precision of the passes; empty where autocast rounds them.
    """

    def __init__(self, stage: LearningStage, term: TermSettings) -> None:
        self.copies: dict[nn.Parameter, Tensor] = {}
        text_encoder, unet = stage.text_encoder, stage.unet
        if (dtype := stage.passes_in) is not None:
            text_encoder, rounded = (
                RoundedWeights(part, every_weight(part), dtype) for part in (text_encoder, unet)
            )
            self.copies = {
                parameter: copy
                for parameter, copy in (text_encoder.copies | rounded.copies).items()
                if parameter.requires_grad
            }

            def unet(noisy: Tensor, *inputs: Any, **options: Any) -> Any:
                return rounded(noisy.to(dtype), *inputs, **options)

        elif torch.is_autocast_enabled(stage.device.type):
            text_encoder, unet = (_with_frozen_weights_rounded(part) for part in (text_encoder, unet))
        self._encode = partial(encode_ids, stage.model, text_encoder=text_encoder)
        self._loss = partial(stage.loss, unet, term=term)

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


def _with_frozen_weights_rounded(part: nn.Module) -> Callable[..., Any]:
    """U-Net or text encoder with frozen weights in autocast's precision, not rounded anew at each step."""
    chosen = {} if part.is_gradient_checkpointing else frozen_products(part)
    if not chosen:
        return part
    return RoundedWeights(part, chosen, torch.get_autocast_dtype(part.device.type))


def _tensors(batch: LearningBatch) -> list[Tensor]:
    return [getattr(batch, each.name) for each in fields(batch)]


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all numbers together, a scalar; summed up in 32 bits whatever the gradients' precision."""
    norms = [
        norm
        for dtype in {each.dtype for each in gradients}
        for norm in torch._foreach_norm(
            [each for each in gradients if each.dtype == dtype], 2, dtype=torch.float32
        )
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    return {"adamw": torch.optim.AdamW, "adamw_8bit": AdamW8bit}[name]
