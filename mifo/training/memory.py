"""How much memory of a GPU learning and synthesis need, counted before anything is loaded.

Weights, gradients and states of the optimiser follow from the shapes. Activations are counted by a pass on
tensors that have shapes alone. `RESERVE` stands for CUDA's own memory, workspaces and pictures being encoded.
Without it, beside what was measured on Stable Diffusion 2.1's shapes (docs/performance.md), in GiB: default
16.3 (16.3), with gradient checkpointing 12.2 (12.2), max_speed 13.2 (11.7), low_vram 3.6 (4.9), a picture 3.9
(3.6).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mifo.acceleration.settings import PerformanceSettings
from mifo.backbones.model import DiffusionModel, Trainable
from mifo.training.settings import LearningSettings, StageSettings

RESERVE = 2.0**30
_AUTOCAST = 0.75  # share of activations of 32 bits: under autocast some have 16


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    weights: float
    gradients: float = 0.0
    states: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.states + self.activations + RESERVE

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "optimiser": self.states}
        told = parts | {"activations": self.activations, "reserve": RESERVE}
        return " + ".join(f"{name} {size / 2**30:.1f}" for name, size in told.items() if size >= 2**20)


def learning_memory(
    model: DiffusionModel, settings: LearningSettings, performance: PerformanceSettings
) -> Memory:
    """That of the stage which needs most.

    Args:
        model: with the instances' words and the adapters that will learn, on the device "meta".
    """
    found = [
        _stage(model, stage, prior_weight, performance)
        for _, stage, prior_weight in settings.stages
        if stage.steps
    ]
    return max(found, key=lambda each: each.total, default=Memory(_bytes(model)))


def synthesis_memory(model: DiffusionModel, samples: int, performance: PerformanceSettings) -> Memory:
    """That of pictures made at once: both halves of a pass, or a guidance pass with its gradient."""
    wide = performance.synthesis_precision == "float32"
    narrow = (
        0 if wide else sum(each.numel() * (each.element_size() - 2) for each in model.denoiser.parameters())
    )
    activations = samples * _activations(model) * (1 if wide else 0.5)
    if performance.gradient_checkpointing:
        activations *= model.kept_of_twice
    return Memory(_bytes(model) - narrow, activations=activations)


def _stage(
    model: DiffusionModel, stage: StageSettings, prior_weight: float, performance: PerformanceSettings
) -> Memory:
    model.set_trainable(cast(Trainable, stage.trainable))
    learning = sum(each.numel() for each in _parameters(model) if each.requires_grad)
    rounded = performance.learning_precision != "float32"
    weights = _bytes(model)
    # copies of 16 bits, of which products are made; a block that is computed twice makes its own
    if rounded and model.dtype == torch.float32 and not performance.gradient_checkpointing:
        weights += sum(
            2 * each.numel() for network in model.networks.values() for each in network.parameters()
        )
    if performance.float8:
        weights -= sum(
            each.weight.numel() * (each.weight.element_size() - 1)
            for network in model.networks.values()
            for each in network.modules()
            if isinstance(each, nn.Linear) and not each.weight.requires_grad
        )
    states = 2 + 8 / 256 if "8bit" in stage.optimizer["_target_"] else 8
    activations = stage.batch_size * (2 if prior_weight else 1) * _activations(model)
    if rounded:
        activations *= _AUTOCAST if performance.autocast else 0.5
    if performance.gradient_checkpointing:
        activations *= model.kept_of_twice
    gradients = learning * (4 if performance.autocast else 2)
    return Memory(weights, gradients, states * learning, activations)


def _parameters(model: DiffusionModel) -> list[Tensor]:
    return [each for network in model.networks.values() for each in network.parameters()]


def _bytes(model: DiffusionModel) -> float:
    parts = [*model.networks.values(), model.autoencoder]
    return sum(each.numel() * each.element_size() for part in parts for each in part.parameters())


class _Attend(torch.autograd.Function):
    """Keeps what fused attention keeps for its gradient."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = torch.empty_like(query)
        context.save_for_backward(query, key, value, attended)
        return attended


class _FusedAttention(TorchFunctionMode):
    """On tensors without numbers PyTorch would keep every probability, which no GPU does."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Attend.apply(named["query"], named["key"], named["value"])
        return function(*args, **(kwargs or {}))


def _activations(model: DiffusionModel) -> float:
    """Bytes that a pass of one sample keeps for its gradient, in 32 bits."""
    weights = {each.untyped_storage()._cdata for each in _parameters(model)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept.setdefault(storage._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _FusedAttention():
        conditioning = model.encode(model.tokenize(["a photo"]))
        noisy = torch.empty(1, *model.latent_shape, device="meta", requires_grad=True)
        model.predict(noisy, torch.zeros(1, device="meta"), conditioning)
    size = sum(each.untyped_storage().nbytes() for each in kept.values())
    return size * 32 / torch.finfo(model.dtype).bits
