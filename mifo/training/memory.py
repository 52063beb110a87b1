"""How much memory of a GPU learning and synthesis need, counted before anything is loaded.

Weights, gradients and states of the optimiser follow from the shapes. What a pass holds at once is watched
while it runs on tensors that have shapes alone. `RESERVE` stands for what CUDA takes beside all tensors.
Without it, the count is within 15 % of the records in `experiments/benchmark` (`tests/test_doctor.py`); those
of pictures whose passes are CUDA graphs leave out the graphs' own memory, which is counted here.
"""

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any, cast
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mifo.acceleration.profile import ready_for_synthesis
from mifo.acceleration.settings import PerformanceSettings
from mifo.backbones.latent import LatentModel
from mifo.backbones.model import Trainable
from mifo.data.learning_data import encoded_at_once
from mifo.method.backbone import Site
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.objective import word_maps
from mifo.method.prompts.instances import find_instances
from mifo.method.synthesis.sampler import Regions, Sampler
from mifo.method.synthesis.settings import SynthesisSettings
from mifo.training.settings import LearningSettings, StageSettings

RESERVE = 2.0**30
WORKSPACE = 2.0**30  # at most, of the autoencoder's convolutions, as three records have it
_AUTOCAST = 0.75  # share of activations of 32 bits: under autocast some have 16
_BOXES = {"car": (0.1, 0.2, 0.4, 0.8), "cat": (0.6, 0.2, 0.9, 0.8)}  # of a prompt that stands for others


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took of a GPU since its statistics began; without a GPU, this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Memory:
    """Bytes; `encoding` of pictures comes before all else of a stage."""

    weights: float
    gradients: float = 0.0
    states: float = 0.0
    activations: float = 0.0
    encoding: float = 0.0

    @property
    def total(self) -> float:
        return sum(astuple(self)) + RESERVE

    def __str__(self) -> str:
        names = ("weights", "gradients", "optimiser", "activations", "encoding pictures", "reserve")
        parts = zip(names, (*astuple(self), RESERVE), strict=True)
        return " + ".join(f"{name} {size / 2**30:.1f}" for name, size in parts if size >= 2**20)


def learning_memory(
    model: LatentModel, settings: LearningSettings, performance: PerformanceSettings
) -> Memory:
    """That of the stage which needs most.

    Args:
        model: with the instances' words and the adapters that will learn, on the device "meta"; afterwards as
            its last stage has it.
    """
    if performance.gradient_checkpointing:
        model.enable_checkpointing()
    found = [
        each
        for name, stage, prior_weight in settings.stages
        if stage.steps
        for each in _stage(model, getattr(model.default_sites, name), stage, prior_weight, performance)
    ]
    return max(found, key=lambda each: each.total, default=Memory(_bytes(model)))


@torch.no_grad()
def synthesis_memory(
    model: LatentModel,
    settings: SynthesisSettings,
    guidance: GuidanceSettings,
    performance: PerformanceSettings,
) -> Memory:
    """That of pictures made at once, in two boxes: of guidance, a denoising pass, or decoding.

    Args:
        model: on the device "meta"; afterwards as synthesis has it.
    """
    ready_for_synthesis(model, replace(performance, channels_last=False, compile=False))
    prompt, samples = "a photo of a car and a cat", settings.samples
    sampler = Sampler(model, settings, replace(guidance, iterations=1, margin=0.0))
    tokens = find_instances(prompt, list(_BOXES), model.words)
    conditioning = model.encode_prompts([""] * samples + [prompt] * samples).to(model.dtype)
    regions = Regions(sampler, _BOXES, tokens, samples, model.device)
    latents = torch.empty(samples, *model.latent_shape, device=model.device)

    codes = model.unpacked(latents.to(model.autoencoder.dtype))
    passes: list[Callable[[], Any]] = [
        lambda: regions.guide(latents, conditioning, 0),
        lambda: sampler.denoise(latents, conditioning, 0, regions),
        lambda: model.autoencoder.decode(codes),
    ]
    return Memory(_bytes(model), activations=max(_peak(model, each) for each in passes))


def _stage(
    model: LatentModel,
    sites: Sequence[Site],
    stage: StageSettings,
    prior_weight: float,
    performance: PerformanceSettings,
) -> list[Memory]:
    """While pictures are encoded, and at a step."""
    model.set_trainable(cast(Trainable, stage.trainable))
    learning = sum(each.numel() for each in _parameters(model) if each.requires_grad)
    rounded = performance.learning_precision != "float32"
    weights = _bytes(model)
    if performance.float8:
        weights -= sum(
            each.weight.numel() * (each.weight.element_size() - 1)
            for network in model.networks.values()
            for each in network.modules()
            if isinstance(each, nn.Linear) and not each.weight.requires_grad
        )
    # the image and its mirror image; class pictures in 16 bits
    at_once = encoded_at_once(model.image_size, performance)
    pictures = max(2.0, at_once * (0.5 if rounded else 1) if prior_weight else 0)
    empty = torch.empty(3, model.image_size, model.image_size, device=model.device)
    encoding = pictures * _peak(model, lambda: model.encode_images([empty]))
    encoding += min(encoding, WORKSPACE)
    # copies of 16 bits, of which products are made; a block that is computed twice makes its own
    copies = 0
    if rounded and model.dtype == torch.float32 and not performance.gradient_checkpointing:
        copies = 2 * sum(each.numel() for each in _parameters(model))
    classes, dtype = stage.batch_size if prior_weight else 0, model.dtype
    if performance.autocast:
        activations = _step(model, sites, stage.batch_size, classes)
        if rounded and dtype == torch.float32:
            activations *= _AUTOCAST
    else:
        _cast(model, torch.bfloat16)
        activations = _step(model, sites, stage.batch_size, classes)
        _cast(model, dtype)
    gradients = learning * (4 if performance.autocast else 2)
    return [
        Memory(_bytes(model)),  # before weights are kept in 8 bits
        Memory(weights, encoding=encoding),
        Memory(weights + copies, gradients, stage.state_bytes * learning, activations),
    ]


def _cast(model: LatentModel, dtype: torch.dtype) -> None:
    """As `performance.autocast=false` rounds the networks for a step."""
    for network in model.networks.values():
        nn.Module.to(network, dtype)


def _step(model: LatentModel, sites: Sequence[Site], samples: int, classes: int) -> float:
    """Bytes that a learning step holds at once in the model's precision, beside weights and gradients."""
    prompt = f"a photo of {' and '.join(model.new_words) or 'it'}"
    places = torch.zeros(samples, max(1, len(model.new_words)), dtype=torch.long, device=model.device)
    for network in model.networks.values():
        network.train()

    def step() -> None:
        rows = classes + samples
        noisy = torch.empty(rows, *model.latent_shape, device=model.device)
        predicted, maps = model.predict(
            noisy,
            torch.zeros(rows, device=model.device),
            model.encode(model.tokenize([prompt] * rows)),
            dict.fromkeys(sites, word_maps(places)),
        )
        loss = sum([each.square().mean() for each in maps.values()], predicted.float().square().mean())
        del predicted, maps
        loss.backward()

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [
        each.register_post_accumulate_grad_hook(drop) for each in _parameters(model) if each.requires_grad
    ]
    found = _peak(model, step)
    for hook in hooks:
        hook.remove()
    return found


def _parameters(model: LatentModel) -> list[nn.Parameter]:
    return [each for network in model.networks.values() for each in network.parameters()]


def _parts(model: LatentModel) -> list[nn.Module]:
    return [*model.networks.values(), model.autoencoder]


def _bytes(model: LatentModel) -> float:
    return sum(each.numel() * each.element_size() for part in _parts(model) for each in part.parameters())


class _Attend(torch.autograd.Function):
    """Keeps what fused attention keeps for its gradient."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = torch.empty_like(query)
        context.save_for_backward(query, key, value, attended)
        return attended

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _ = context.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On tensors without numbers PyTorch would keep every probability, which no GPU does.

    A mode of PyTorch would not be in force where checkpoints compute a block again.
    """
    usual = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Attend.apply(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual


class _Watch(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it.

    Attributes:
        now: of those that still exist. most: the largest `now`.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self._known, self.now, self.most = known, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in tree_iter(made):
            if isinstance(each, Tensor) and (storage := each.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


def _peak(model: LatentModel, function: Callable[[], Any]) -> float:
    """The largest number of bytes that tensors made by a function have at once, without the model's."""
    own = [each for part in _parts(model) for each in (*part.parameters(), *part.buffers())]
    watch = _Watch({each.untyped_storage()._cdata for each in own})
    with _fused_attention(), watch:
        function()
    return watch.most
