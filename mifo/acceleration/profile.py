"""A profile put into effect on a model, as far as the machine allows."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Protocol

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers import transformer_flux2, transformer_z_image
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from mifo.acceleration.channels_last import keep_channels_last
from mifo.acceleration.compiling import compile_blocks
from mifo.acceleration.float8 import keep_in_float8
from mifo.acceleration.rms_norm import fuse_rms_norms
from mifo.acceleration.settings import PerformanceSettings
from mifo.errors import MifoError, check_known

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}

# what a compiler may fuse: the denoiser's attention is left out, whose processors keep maps and differ from
# layer to layer; and CLIP's layers, which transformers gives a mask only while a graph is captured, so that
# they would be compiled anew within the capture, which fails
_COMPILED = (
    ResnetBlock2D,
    FeedForward,
    transformer_flux2.Flux2FeedForward,
    transformer_flux2.Flux2SwiGLU,
    transformer_z_image.FeedForward,
    Qwen3DecoderLayer,
)

log = logging.getLogger(__name__)


class Accelerated(Protocol):
    """What a profile is applied to: the networks of a model, by what they do."""

    @property
    def denoiser(self) -> nn.Module: ...

    @property
    def autoencoder(self) -> nn.Module: ...

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Those that can learn."""

    def enable_checkpointing(self) -> None:
        """Compute activations twice instead of keeping them."""


def check_performance(settings: PerformanceSettings) -> None:
    """Refuse values that no machine knows.

    Raises:
        MifoError: naming the key and the values that it takes.
    """
    for key, known in (
        ("matmul_precision", ("highest", "high", "medium")),
        ("learning_precision", ("auto", *PRECISIONS)),
        ("synthesis_precision", ("auto", *PRECISIONS)),
    ):
        check_known(f"performance.{key}", getattr(settings, key), known)
    if settings.threads is not None and settings.threads < 0:
        raise MifoError(
            f"performance.threads={settings.threads} is no number of threads; take at least 1, or null."
        )
    if settings.float8 and not settings.gradient_checkpointing:
        raise MifoError(
            "performance.float8 saves memory only with performance.gradient_checkpointing=true; set that too."
        )
    if settings.gradient_checkpointing and not settings.autocast:
        raise MifoError(
            "performance.gradient_checkpointing excludes performance.autocast=false; leave one of them out."
        )
    if not settings.autocast and settings.learning_precision not in ("auto", "bfloat16"):
        raise MifoError(
            "performance.autocast=false needs performance.learning_precision=bfloat16 (or auto): other "
            "precisions have no passes of their own."
        )


def available(
    settings: PerformanceSettings, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> PerformanceSettings:
    """What of a profile this machine can do; one line tells what is left out. "auto" is resolved."""
    gpu = torch.device(device).type == "cuda"
    settings = _automatic(settings, gpu, dtype)
    # float16 needs scaled gradients, which the processor does not have
    meant = {"auto": "bfloat16" if gpu and torch.cuda.is_bf16_supported() else "float32"}
    meant |= {} if gpu else {"float16": "float32"}
    resolved = replace(
        settings,
        learning_precision=meant.get(settings.learning_precision, settings.learning_precision),
        synthesis_precision=meant.get(settings.synthesis_precision, settings.synthesis_precision),
        cuda_graphs=settings.cuda_graphs and gpu,
        compile=settings.compile and _compiles(device),
    )
    left_out = [
        name
        for name, key in (("CUDA graphs", "cuda_graphs"), ("compiled blocks", "compile"))
        if getattr(settings, key) and not getattr(resolved, key)
    ]
    if left_out:
        _tell_missing(settings.name, " and ".join(left_out))
    return resolved


def _automatic(settings: PerformanceSettings, gpu: bool, dtype: torch.dtype) -> PerformanceSettings:
    """`performance=auto` made definite: max_speed on a GPU that has bfloat16, default on a processor.

    What was typed beside it, and base weights that are not of type float32 (`dtype`), may exclude max_speed;
    then it is default with CUDA graphs.
    """
    if settings.name != "auto":
        return settings
    if not gpu:
        return replace(settings, name="default")
    free = settings.learning_precision == "auto" and not settings.gradient_checkpointing
    if free and dtype is torch.float32 and torch.cuda.is_bf16_supported():
        _tell_automatic("max_speed: bfloat16 passes, channels-last layout, CUDA graphs")
        return replace(settings, name="max_speed", autocast=False, channels_last=True, cuda_graphs=True)
    _tell_automatic("default with CUDA graphs, since max_speed needs whole weights of 32 bits and bfloat16")
    return replace(settings, name="default", cuda_graphs=True)


@cache  # said once, though a run asks for its profile before learning, in learning and in synthesis
def _tell_missing(name: str, left_out: str) -> None:
    log.warning("performance=%s goes on without %s, which this machine lacks.", name, left_out)


@cache
def _tell_automatic(taken: str) -> None:
    log.info("performance=auto takes %s.", taken)


def ready_for_learning(model: Accelerated, settings: PerformanceSettings) -> None:
    """Lay out, compile and checkpoint the model as the profile says, in place.

    With `float8` nothing of the networks may learn but what is added to them.
    """
    if settings.float8:
        for network in model.networks.values():
            keep_in_float8(network)
    _lay_out(model, settings)
    if settings.gradient_checkpointing:
        model.enable_checkpointing()


def ready_for_synthesis(model: Accelerated, settings: PerformanceSettings) -> None:
    """Bring denoiser and autoencoder to the profile's precision and layout, in place.

    Learning needs the model anew. In float16 the autoencoder stays in float32, since its activations leave
    that range.
    """
    dtype = getattr(torch, settings.synthesis_precision)
    for part in (model.denoiser,) if dtype is torch.float16 else (model.denoiser, model.autoencoder):
        nn.Module.to(part, dtype)  # diffusers' own `to` warns about modules that it does not have
    _lay_out(model, settings)
    if settings.gradient_checkpointing:  # guidance has gradients too
        model.enable_checkpointing()


def _lay_out(model: Accelerated, settings: PerformanceSettings) -> None:
    for network in model.networks.values():
        fuse_rms_norms(network)
    if settings.channels_last:
        for part in (model.denoiser, model.autoencoder):
            part.to(memory_format=torch.channels_last)
            keep_channels_last(part)
    if settings.compile:
        for network in model.networks.values():
            compile_blocks(network, *_COMPILED)


def _compiles(device: torch.device | str) -> bool:
    """Whether a function can be compiled here, found by trying."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # a compiler can lack in many ways, each with an exception of its own
        log.debug("torch.compile: %s", error)
        return False
    return True
