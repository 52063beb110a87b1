"""Stopwatches, memory and operations, on a GPU and without one."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import Callback, Trainer
from torch.utils.flop_counter import FlopCounterMode

from mifo.training.memory import peak_memory


@dataclass
class Measurement:
    """One row.

    Attributes:
        seconds: the median, of `samples` samples from `fastest` to `slowest`.
        peak_gib: largest memory held by tensors on the GPU; of the whole process without a GPU.
        tflop: floating-point operations of the model in one sample; of products and convolutions.
        share_of_peak: tflop / seconds as a share of the machine's measured peak.
        notes: what else was seen.
    """

    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    samples: int = 0
    peak_gib: float | None = None
    tflop: float | None = None
    share_of_peak: float | None = None
    notes: dict[str, float | int | bool | str] = field(default_factory=dict)


def measured(seconds: Sequence[float], peak_gib: float) -> Measurement:
    """The row of these samples."""
    return Measurement(statistics.median(seconds), min(seconds), max(seconds), len(seconds), peak_gib)


class Memory:
    """The peak of memory since it was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()  # Lightning's objects refer to each other, so that an earlier row's weights may linger
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    def peak_gib(self) -> float:
        return peak_memory(self._device) / 2**30


def stopwatch(device: torch.device, function: Callable[[], object]) -> float:
    """Seconds that a call takes until the device has finished it."""
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def tera_operations(function: Callable[[], object]) -> float:
    """10¹² floating-point operations of the products and convolutions in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e12


def peak_tera_operations(device: torch.device, dtype: torch.dtype) -> float:
    """10¹² operations a second of a large square matrix product: what the machine can do."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = [stopwatch(device, lambda: a @ b) for _ in range(13)][3:]
    return 2 * side**3 / statistics.median(seconds) / 1e12


class StepTimes(Callback):
    """Seconds of each step of learning after the first `warmup`, Lightning's own part included.

    On a GPU the times are events in its queue: nothing waits for them until the end of the stage.
    """

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.seconds: list[float] = []
        self._marks: list[Any] = []  # events of a GPU, or seconds

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step < self.warmup:
            return
        if trainer.strategy.root_device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self._marks.append(mark)
        else:
            self._marks.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, *args: object) -> None:
        _wait(trainer.strategy.root_device)
        for before, after in zip(self._marks, self._marks[1:], strict=False):
            timed = isinstance(before, float)
            self.seconds.append(after - before if timed else before.elapsed_time(after) / 1000)


class Losses(Callback):
    """The loss of each step, kept on the device until it is asked for."""

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: object) -> None:
        self._losses.append(module.last.total.detach().clone())

    def values(self) -> torch.Tensor:
        return torch.stack(self._losses).cpu()


class LearningEnd(Callback):
    """When the last stage ended, by `time.perf_counter`."""

    def on_train_end(self, trainer: Trainer, *args: object) -> None:
        _wait(trainer.strategy.root_device)
        self.time = time.perf_counter()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
