"""Functions of tensors replayed as CUDA graphs, so that the GPU need not wait for Python."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from mifo.acceleration.kernels import own
from mifo.acceleration.weight_gradients import WeightGradientsBeside
from mifo.errors import first_line

log = logging.getLogger(__name__)


class Known(Tensor):
    """A few numbers on the processor that a captured function reads in Python; `as_subclass` makes them."""


class GraphedFunction:
    """A function of trees of tensors, captured at its first call and replayed from then on.

    What it returns is overwritten by the next call. Tensors it closes over are read anew at each replay, so
    they may change in place; Python values are fixed at the capture. Inputs of another form or shape, or with
    other numbers that are `Known`, are captured anew, and the capture before is forgotten. No gradient flows
    through. If `wanted` is false or the capture fails, which one line tells, it is an ordinary call.

    Args:
        function: of tuples, lists and dicts of tensors and None, to such a tree; it must not wait for the
            device.
        wanted: whether to capture at all; that needs a GPU of NVIDIA.
    """

    def __init__(self, function: Callable[..., Any], wanted: bool) -> None:
        self._function = function
        self._wanted = wanted
        self._form: Any = None
        self._replay: Callable[..., Any] | None = None

    def __call__(self, *inputs: Any) -> Any:
        if not self._wanted:
            return self._function(*inputs)
        _, form = _leaves(inputs)
        if form != self._form or self._replay is None:
            self._replay = None  # the memory of the old graph goes before a new one is captured
            try:
                self._replay = capture(self._function, inputs)
            except RuntimeError as error:
                _tell(error)
                self._wanted = False
                return self._function(*inputs)
            self._form = form
        return self._replay(*inputs)


class GraphedStep:
    """A loss and its gradients as one graph, captured at the first call and replayed from then on.

    `.grad` of the parameters points to where the graph writes, so that no gradient is copied; the next call
    overwrites it, so gradients can not add up over several calls. Otherwise as `GraphedFunction`.

    Args:
        function: of trees of tensors, of one form, to the loss and any tree of detached tensors beside it.
        parameters: what the loss is differentiated by.
        wanted: whether to capture at all; that needs a GPU of NVIDIA.
        copies: what the function reads in place of some parameters, which get the gradients of their copies.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, Any]],
        parameters: Sequence[nn.Parameter],
        wanted: bool,
        copies: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        self._function = function
        self._parameters = parameters
        copies = copies or {}
        self._leaves = [copies.get(each, each) for each in parameters]
        self._wanted = wanted
        self._beside: AbstractContextManager[Any] = (
            WeightGradientsBeside(self._leaves[0].device) if own("weight_gradients") else nullcontext()
        )
        self._replay: Callable[..., Any] | None = None
        self._gradients: Sequence[Tensor | None] | None = None

    def __call__(self, *inputs: Any) -> tuple[Tensor, Any]:
        """The loss and what comes with it; call `backward` on the loss next."""
        if self._wanted and self._replay is None:
            try:
                self._replay = capture(self._loss_and_gradients, inputs)
            except RuntimeError as error:
                _tell(error)
                self._wanted = False
        if self._replay is None:
            return self._function(*inputs)
        loss, rest, self._gradients = self._replay(*inputs)
        return loss, rest

    def backward(self, loss: Tensor, backward: Callable[[Tensor], None] = Tensor.backward) -> None:
        """Give the parameters the gradients of the last call's loss; those of before must be gone.

        Args:
            backward: computes the gradients where no graph has.
        """
        if self._gradients is None:
            backward(loss)
            for parameter, leaf in zip(self._parameters, self._leaves, strict=True):
                if leaf is not parameter and leaf.grad is not None:
                    parameter.grad = _laid_out([leaf.grad], [parameter])[0]
                    leaf.grad = None
            return
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _loss_and_gradients(self, *inputs: Any) -> tuple[Tensor, Any, Sequence[Tensor | None]]:
        with self._beside:
            loss, rest = self._function(*inputs)
            # the engine would take autocast over to the products of the backward pass, which knows its
            # precisions
            with torch.autocast(loss.device.type, enabled=False):
                gradients = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        return loss.detach(), rest, _laid_out(gradients, self._parameters)


def capture(function: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
    """A function as a CUDA graph: what it returns is overwritten at each call, and passes no gradients on.

    Raises:
        RuntimeError: it can not be captured, or there is no GPU.
    """
    buffers = tree_map_only(Tensor, lambda each: each.detach().clone(), tuple(inputs))
    graph, stream = torch.cuda.CUDAGraph(), _stream_of_captures(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*buffers)  # libraries set themselves up, and what is kept gets computed
    torch.cuda.current_stream().wait_stream(stream)
    try:
        # relaxed: other threads may use the GPU meanwhile, as they do to load its libraries
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            outputs = function(*buffers)
    except RuntimeError:
        # after a failed capture, drawing random numbers on the GPU raises "Offset increment outside graph
        # capture" until another capture ends; so one ends here
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="relaxed"):
            torch.zeros(1, device="cuda")
        raise
    places = _leaves(buffers)[0]

    def replay(*inputs: Any) -> Any:
        for place, each in zip(places, _leaves(inputs)[0], strict=True):
            place.copy_(each)
        graph.replay()
        return outputs

    return replay


def _leaves(inputs: Sequence[Any]) -> tuple[list[Tensor], Any]:
    """The tensors of a tree of inputs that a graph reads anew, and its form with their shapes."""
    leaves, structure = tree_flatten(tuple(inputs))
    tensors = [each for each in leaves if isinstance(each, Tensor) and not isinstance(each, Known)]
    known = [each.tolist() for each in leaves if isinstance(each, Known)]
    return tensors, (structure, [each.shape for each in tensors], known)


@cache
def _stream_of_captures(device: int) -> torch.cuda.Stream:
    """One for all captures, since cuBLAS keeps memory for each stream that it ever ran on."""
    # operations of a graph go before those of the streams that it starts
    return torch.cuda.Stream(device, priority=-1)


def _laid_out(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Gradients in memory of their own each, laid out as the parameters and in the precision they take."""
    found, own = set(), []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is not None:
            memory, dtype = gradient.untyped_storage().data_ptr(), _gradients_dtype(parameter)
            if memory in found or gradient.stride() != parameter.stride() or gradient.dtype != dtype:
                gradient = torch.empty_like(parameter, dtype=dtype).copy_(gradient)
            found.add(memory)
        own.append(gradient)
    return own


def take_gradients_in(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Let a parameter take gradients of another precision; before PyTorch 2.10 they are converted."""
    if hasattr(parameter, "grad_dtype"):
        parameter.grad_dtype = dtype


def _gradients_dtype(parameter: nn.Parameter) -> torch.dtype:
    """That of the parameter, unless it takes another one, see `take_gradients_in`."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def _tell(error: RuntimeError) -> None:
    # the end of a failed capture says only that something failed before
    while isinstance(error.__context__, RuntimeError) and not error.__suppress_context__:
        error = error.__context__
    log.warning("No CUDA graph could be captured (%s): going on without.", first_line(error))
