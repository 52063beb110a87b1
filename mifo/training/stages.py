"""Both stages of learning as one LightningModule: which parameters learn, by which optimiser and loss."""

import logging
from collections.abc import Callable
from typing import Any, cast

import lightning
import torch
from torch import Tensor, nn

from mifo.acceleration.adamw_8bit import AdamW8bit
from mifo.acceleration.graphs import GraphedStep, take_gradients_in
from mifo.acceleration.rounding import RoundedWeights, every_weight, frozen_products
from mifo.backbones.model import DiffusionModel, Trainable
from mifo.data.instances import InstanceSet
from mifo.data.learning_data import LearningBatch
from mifo.method.backbone import Stage
from mifo.method.losses.settings import PenaltySettings
from mifo.method.losses.timeline import Term, Timeline
from mifo.method.objective import LossParts, learning_loss
from mifo.training.checkpoints import check_checkpoint
from mifo.training.settings import StageSettings
from mifo.training.targets import make_lr_scheduler, make_optimizer

log = logging.getLogger(__name__)


class LearningStage(lightning.LightningModule):
    """Semantic learning or fine-tuning. Checkpoints hold the parameters that learn and the optimiser only.

    Optimisation is manual, since a step that is replayed as a CUDA graph has its gradients before Lightning
    would ask for them.
    """

    def __init__(
        self,
        stage: Stage,
        model: DiffusionModel,
        instances: InstanceSet,
        settings: StageSettings,
        penalty: PenaltySettings,
        prior_weight: float,
        graphs: bool,
        passes_in: torch.dtype | None,
    ) -> None:
        """With `graphs` a step is replayed as a CUDA graph; that needs a GPU of NVIDIA.

        With `passes_in` a step runs wholly in that precision, on copies of the weights, without autocast.
        """
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # the base model is not in a checkpoint
        self.stage = stage  # also the prefix of what is logged
        self.model, self.instances, self.settings = model, instances, settings
        for name, network in model.networks.items():
            self.add_module(name, network)
        self.prior_weight = prior_weight
        self.timeline = Timeline(penalty, stage, settings.steps, model)
        self.last: LossParts | None = None  # of the last step; reading its values waits for the device
        # before clipping, a scalar; None where it is not clipped, or scaled for float16 and may overflow
        self.gradient_norm: Tensor | None = None
        self.passes_in = passes_in
        self._graphs = graphs
        self._copies: dict[nn.Parameter, Tensor] = {}  # of learning weights, rounded
        self._steps: dict[tuple[Term, ...], GraphedStep] = {}  # the step of the active terms alone
        model.set_trainable(cast(Trainable, settings.trainable))  # `check_learning` has seen it
        self.train()

    def configure_optimizers(self) -> dict[str, Any]:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        # one kernel for all parameters, which would have to unscale the gradients of float16 by itself
        fused = self.device.type in ("cuda", "cpu") and self.trainer.precision != "16-mixed"
        optimizer = make_optimizer(self.stage, self.settings, parameters, fused)
        return {
            "optimizer": optimizer,
            "lr_scheduler": make_lr_scheduler(self.stage, self.settings, optimizer),
        }

    def on_fit_start(self) -> None:
        # a graph would leave out what Lightning does to gradients on their way
        if self._graphs and self.trainer.precision == "16-mixed":
            self._graphs = False
            log.warning("Learning goes on without CUDA graphs, since float16 scales the gradients.")

    def training_step(self, batch: LearningBatch, batch_index: int) -> None:
        terms, weights = self._terms(self.global_step)
        step, optimizer = self._step(terms), self.optimizers()
        total, (parts, maps) = step(batch, weights)
        with torch.autocast(self.device.type, enabled=False):  # which would round the gradients' products
            step.backward(total, self.manual_backward)
        optimizer.step()
        self._update_copies()
        optimizer.zero_grad()
        self.lr_schedulers().step()
        self.last = LossParts(total.detach(), **parts, maps=maps)
        # values are read, which waits for the device, only at the steps that are logged
        if self.global_step % self.trainer.log_every_n_steps == 0:
            losses = {"total": self.last.total, **parts}
            self.log_dict({f"{self.stage}/loss/{name}": value for name, value in losses.items()})

    def forward(
        self, terms: tuple[Term, ...], batch: LearningBatch, weights: Tensor
    ) -> tuple[Tensor, tuple[dict[str, Tensor], dict[Any, Tensor]]]:
        """The loss of a batch, the loss's detached parts by name, and attention maps by site."""
        conditioning = self.model.encode(batch.ids)
        loss = learning_loss(self.model, conditioning, batch.inputs, terms, weights, self.prior_weight)
        parts = {name: getattr(loss, name).detach() for name in ("denoising", "prior", "attention")}
        return loss.total, (parts, loss.maps)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip by the norm of all gradients together; gradients of float16 are no longer scaled here."""
        if not self.settings.gradient_clip:
            return
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        norm = total_norm([each.grad for each in parameters if each.grad is not None])
        self.gradient_norm = None if self.trainer.precision == "16-mixed" else norm
        if optimizer.defaults.get("fused") or isinstance(optimizer, AdamW8bit):
            # divides the gradients as it reads them, which spares a pass over them; also GradScaler's way
            scale = ((norm + 1e-6) / self.settings.gradient_clip).clamp(min=1)
            optimizer.grad_scale = scale  # type: ignore[attr-defined]
        else:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.gradient_clip, norm)

    def release(self) -> None:
        """Drop CUDA graphs, gradients and copies of weights."""
        self._steps.clear()
        self.zero_grad()
        for parameter in self._copies:
            take_gradients_in(parameter, parameter.dtype)
        self._copies = {}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The parameters that learn, without the others."""
        return {name: each.detach() for name, each in self.named_parameters() if each.requires_grad}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_checkpoint(checkpoint, self.state_dict())

    def eager_step(self, batch: LearningBatch) -> Tensor:
        """The loss of the first step, without a graph, so that its operations can be counted."""
        terms, weights = self._terms(0)
        with self.trainer.precision_plugin.forward_context():
            return self._rounded()[0](terms, batch, weights)[0]

    def _terms(self, step: int) -> tuple[tuple[Term, ...], Tensor]:
        """The terms of the attention loss that are active at a step, and their weights (terms,)."""
        terms = self.timeline.active(step)
        weights = torch.tensor([self.timeline.weight(term, step) for term in terms])
        return terms, weights.to(self.device, non_blocking=True)

    def _step(self, terms: tuple[Term, ...]) -> GraphedStep:
        """The step of the active terms; the step of other terms is dropped first, to free its graph."""
        if terms not in self._steps:
            self._steps.clear()
            loss, self._copies = self._rounded()
            optimizer = self.optimizers(use_pl_optimizer=False)
            if isinstance(optimizer, AdamW8bit):  # brings the copies up to date itself
                optimizer.copies = self._copies
                for parameter, copy in self._copies.items():
                    take_gradients_in(parameter, copy.dtype)
            parameters = [each for each in self.parameters() if each.requires_grad]
            self._steps[terms] = GraphedStep(
                lambda batch, weights: loss(terms, batch, weights), parameters, self._graphs, self._copies
            )
        return self._steps[terms]

    def _rounded(self) -> tuple[Callable[..., Any], dict[nn.Parameter, Tensor]]:
        """The loss on rounded copies of weights, and the copies of learning weights (none under autocast)."""
        if self.passes_in is not None:
            rounded = RoundedWeights(self, every_weight(self), self.passes_in)
            return rounded, {each: copy for each, copy in rounded.copies.items() if each.requires_grad}
        # not rounded anew at each step; weights that are read again in the backward pass must stay in place
        rounds = torch.is_autocast_enabled(self.device.type) and not self.model.checkpointing
        if rounds and (chosen := frozen_products(self)):
            return RoundedWeights(self, chosen, torch.get_autocast_dtype(self.device.type)), {}
        return self, {}

    def _update_copies(self) -> None:
        if self._copies and not isinstance(self.optimizers(use_pl_optimizer=False), AdamW8bit):
            with torch.no_grad():
                torch._foreach_copy_(list(self._copies.values()), list(self._copies))


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all numbers together, a scalar; summed up in 32 bits whatever the gradients' precision."""
    norms = [
        norm
        for dtype in {each.dtype for each in gradients}
        for norm in torch._foreach_norm(
            [each for each in gradients if each.dtype == dtype], 2, dtype=torch.float32
        )
    ]
    return torch.linalg.vector_norm(torch.stack(norms))
