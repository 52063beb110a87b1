"""Gradients of weights on a stream of their own, beside those of activations.

Only gradients of activations wait for each other, layer after layer, and on small pictures they leave much of
a GPU idle. Those of weights and biases, which nothing waits for until the optimiser's step, fill it: a step
of stage 2 takes 10 % longer without it (`experiments/benchmark`).
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

AHEAD = 16  # layers whose weights may wait; their activations and gradients stay in memory so long


class WeightGradientsBeside(TorchFunctionMode):
    """Linear layers, convolutions and layer norms of a pass in this block take gradients in two streams.

    They are computed by the same operations and come out the same. The backward pass must end within the
    block: after it the current stream waits for the other one. On a processor everything runs in one order.
    Layers that autocast would convert, those whose weights do not learn or are made from others, and
    convolutions with padding="same" stay as they are.

    Args:
        device: of the layers.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._uses: Counter[int] = Counter()
        self._waiting: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if (kind := _KINDS.get(function)) is None:
            return function(*args, **kwargs)
        given = kind.arguments(*args, **kwargs)
        if not _takes_part(*given):
            return function(*args, **kwargs)
        self._uses[id(given[1])] += 1
        return _Layer.apply(self, kind, *given)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        # a stream that nothing ran on is not part of a capture, which must not wait for it
        if self._waiting and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._waiting.clear()
        self._uses.clear()

    def beside(self, weight: Tensor, read: tuple[Tensor, ...], compute: Callable[[], Any]) -> Any:
        """What `compute` returns, computed on the other stream.

        Args:
            weight: whose gradient it is. Gradients of a weight that several layers share add up on the
                current stream, and are computed there.
            read: what it reads, which must not be overwritten.
        """
        if self._stream is None or self._uses[id(weight)] > 1:
            return compute()
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = compute()
            # memory freed here is given to what runs next on the current stream
            self._waiting.append((self._stream.record_event(), read))
        if len(self._waiting) > AHEAD:
            done, _ = self._waiting.popleft()
            here.wait_event(done)
        return result


def _takes_part(x: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any) -> bool:
    return (
        weight is not None
        and weight.requires_grad
        and torch.is_grad_enabled()
        # what a weight is made from would take its gradient before it is there
        and all(each is None or each.is_leaf for each in (weight, bias))
        and not torch.is_autocast_enabled(x.device.type)
        and not any(isinstance(each, str) for each in options)
    )


class _Kind(NamedTuple):
    """A kind of layer: of an input x, a weight, a bias or None, and options.

    Attributes:
        arguments: these from those of PyTorch's function.
        forward: from these to the output and what else the gradients read.
        gradients: of x, weight and bias where they are wanted, from the output's gradient, x, weight, bias,
            what else `forward` gave, the options and which are wanted.
    """

    arguments: Callable[..., tuple[Any, ...]]
    forward: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    gradients: Callable[..., tuple[Tensor | None, ...]]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mode: WeightGradientsBeside,
        kind: _Kind,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *options: Any,
    ) -> Tensor:
        y, others = kind.forward(x, weight, bias, *options)
        ctx.save_for_backward(x, weight, bias, *others)
        ctx.mode, ctx.kind, ctx.options = mode, kind, options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        read, (of_input, _, of_bias) = (dy, *ctx.saved_tensors), ctx.needs_input_grad[2:5]

        def gradients(*wanted: bool) -> tuple[Tensor | None, ...]:
            return ctx.kind.gradients(*read, *ctx.options, wanted)

        _, dweight, dbias = ctx.mode.beside(read[2], read, lambda: gradients(False, True, of_bias))
        dx = gradients(True, False, False)[0] if of_input else None
        return None, None, dx, dweight, dbias, *[None] * len(ctx.options)


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    return input, weight, bias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    return F.linear(x, weight, bias), ()


def _linear_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    of_input, of_weight, of_bias = wanted
    rows = dy.flatten(0, -2)
    return (
        dy @ weight if of_input else None,
        rows.t() @ x.flatten(0, -2) if of_weight else None,
        rows.sum(0) if of_bias else None,
    )


def _convolution_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Any, ...]:
    return input, weight, bias, stride, padding, dilation, groups


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return F.conv2d(x, weight, bias, *options), ()


def _convolution_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    sizes = [
        list(each) if isinstance(each, Sequence) else [each, each] for each in (stride, padding, dilation)
    ]
    options = ([len(weight)], *sizes, False, [0, 0], groups)
    return torch.ops.aten.convolution_backward(dy, x, weight, *options, list(wanted))


def _norm_arguments(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Any, ...]:
    return input, weight, bias, normalized_shape, eps


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, shape: Sequence[int], eps: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    y, *statistics = torch.native_layer_norm(x, shape, weight, bias, eps)
    return y, tuple(statistics)


def _norm_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shape: Sequence[int],
    eps: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    known = (dy, x, list(shape), mean, rstd, weight, bias)
    return torch.ops.aten.native_layer_norm_backward(*known, list(wanted))


_KINDS = {
    F.linear: _Kind(_linear_arguments, _linear, _linear_gradients),
    F.conv2d: _Kind(_convolution_arguments, _convolution, _convolution_gradients),
    F.layer_norm: _Kind(_norm_arguments, _norm, _norm_gradients),
}
