"""Gradients of weights on a stream of their own, beside those of activations.

Only gradients of activations wait for each other, layer after layer, and on small pictures they leave much of
a GPU idle. Those of weights and biases, which nothing waits for until the optimiser's step, fill it.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
        layer = _LAYERS.get(function)
        if layer is None:
            return function(*args, **(kwargs or {}))
        x, weight, *options = layer.arguments(*args, **(kwargs or {}))
        if not _takes_part(x, weight, *options):
            return function(*args, **(kwargs or {}))
        self._uses[id(weight)] += 1
        return layer.apply(self, x, weight, *options)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        # a stream that nothing ran on is not part of a capture, which must not wait for it
        if self._waiting:
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


class _Layer(torch.autograd.Function):
    """A layer of an input, a weight and a bias or None."""

    @staticmethod
    def arguments(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Those of `forward` from those of PyTorch's function."""
        raise NotImplementedError


class _Linear(_Layer):
    @staticmethod
    def arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
        return input, weight, bias

    @staticmethod
    def forward(
        ctx: Any, mode: WeightGradientsBeside, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mode = mode
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, of_input, _, of_bias = ctx.needs_input_grad

        def of_weights() -> tuple[Tensor, Tensor | None]:
            rows = dy.flatten(0, -2)
            return rows.t() @ x.flatten(0, -2), rows.sum(0) if of_bias else None

        dweight, dbias = ctx.mode.beside(weight, (dy, x), of_weights)
        return None, dy @ weight if of_input else None, dweight, dbias


class _Convolution(_Layer):
    @staticmethod
    def arguments(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> tuple[Any, ...]:
        return input, weight, bias, stride, padding, dilation, groups

    @staticmethod
    def forward(
        ctx: Any,
        mode: WeightGradientsBeside,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mode, ctx.options = mode, (stride, padding, dilation, groups)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, of_input, _, of_bias = ctx.needs_input_grad[:4]
        *sizes, groups = ctx.options
        sizes = [list(each) if isinstance(each, Sequence) else [each, each] for each in sizes]
        options = ([len(weight)], *sizes, False, [0, 0], groups)

        def gradients(*wanted: bool) -> tuple[Tensor | None, ...]:
            return torch.ops.aten.convolution_backward(dy, x, weight, *options, list(wanted))

        _, dweight, dbias = ctx.mode.beside(weight, (dy, x), lambda: gradients(False, True, of_bias))
        dx = gradients(True, False, False)[0] if of_input else None
        return None, dx, dweight, dbias, None, None, None, None


class _LayerNorm(_Layer):
    @staticmethod
    def arguments(
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> tuple[Any, ...]:
        return input, weight, bias, normalized_shape, eps

    @staticmethod
    def forward(
        ctx: Any,
        mode: WeightGradientsBeside,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: Sequence[int],
        eps: float,
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.mode, ctx.shape = mode, list(shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        _, of_input, _, of_bias = ctx.needs_input_grad[:4]

        def gradients(*wanted: bool) -> tuple[Tensor | None, ...]:
            known = (dy, x, ctx.shape, mean, rstd, weight, bias)
            return torch.ops.aten.native_layer_norm_backward(*known, list(wanted))

        read = (dy, x, mean, rstd)
        _, dweight, dbias = ctx.mode.beside(weight, read, lambda: gradients(False, True, of_bias))
        dx = gradients(True, False, False)[0] if of_input else None
        return None, dx, dweight, dbias, None, None


_LAYERS = {F.linear: _Linear, F.conv2d: _Convolution, F.layer_norm: _LayerNorm}
