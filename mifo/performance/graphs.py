"""Functions of tensors replayed as CUDA graphs, so that the GPU need not wait for Python."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


class GraphedFunction:
    """A function of tensors, captured at its first call and replayed from then on.

    What it returns is overwritten by the next call. Tensors it closes over are read anew at each replay, so
    they may change in place; Python values are fixed at the capture: call `forget` when one has changed.
    Gradients flow to the inputs and, of a module, to its parameters. If `wanted` is false or the capture
    fails, which one line tells, it is an ordinary call.

    Args:
        function: of tensors only, of one shape each, to a tree of tensors; it must not wait for the device.
        wanted: whether to capture at all; that needs a GPU of NVIDIA.
    """

    def __init__(self, function: Callable[..., Any] | nn.Module, wanted: bool) -> None:
        self._function = function
        self._wanted = wanted
        self._replay: Callable[..., Any] | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        if not self._wanted:
            return self._function(*inputs)
        if self._replay is None:
            self._replay = self._capture(inputs)
        return self._replay(*inputs)

    def forget(self) -> None:
        """Capture anew at the next call."""
        self._replay = None

    def _capture(self, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
        buffers = tuple(each.detach().clone().requires_grad_(each.requires_grad) for each in inputs)
        # capturing a module replaces its `forward`, which is wanted back if it fails
        function = self._function
        captured = _Bound(function) if isinstance(function, nn.Module) else function
        try:
            # one round beforehand, in which libraries set themselves up and what is kept gets computed
            return torch.cuda.make_graphed_callables(
                captured, buffers, num_warmup_iters=1, allow_unused_input=True
            )
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("No CUDA graph could be captured (%s): going on without.", reason)
            return function


class _Bound(nn.Module):
    """A module to capture in the place of another, with its parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.train(module.training)

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)
