"""GroupNorm, alone or followed by SiLU, of channels-last activations as they lie in memory.

PyTorch's copies them to NCHW first, takes the moments of each group in one block of threads, and leaves SiLU
to a kernel of its own: a step of stage 1 takes 17 % longer with it, of stage 2 13 %
(`experiments/benchmark`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mifo.acceleration.kernels import kernels_take, plain


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """Normalise each group of channels to mean 0 and variance 1, scale, shift and apply SiLU if asked.

    On a GPU with Triton two kernels compute it in float32, round once, and give the same bits at each call;
    they can be captured in a CUDA graph after a first call, which compiles them. Elsewhere, under
    `torch.compile` and for what they do not take, it is PyTorch's own, with its precisions under autocast.

    Args:
        x: (N, C, H, W), float32, bfloat16 or float16, of any layout; all but channels-last costs a copy.
        weight, bias: (C,), of any of these dtypes on the kernels' path.
        groups: a divisor of C.

    Returns:
        As x; channels-last on the kernels' path. Gradients of x, too, are channels-last.

    Raises:
        ValueError: C is not a multiple of `groups`.
    """
    if x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} channels do not make {groups} groups.")
    if _has_kernels(x):
        return _GroupNormSiLU.apply(x, weight, bias, groups, eps, silu)
    return plain("group_norm", _plain)(x, weight, bias, groups, eps, silu)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def _has_kernels(x: Tensor) -> bool:
    return kernels_take("group_norm", x) and x.dim() == 4


class _GroupNormSiLU(torch.autograd.Function):
    """Keeps the input, not the normalised activations, for its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        from mifo.acceleration.group_norm_kernels import normalised

        x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = weight.contiguous(), bias.contiguous()
        y, mean, rstd = normalised(x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from mifo.acceleration.group_norm_kernels import gradients

        x, weight, bias, mean, rstd = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        dx, dweight, dbias = gradients(
            dy, x, weight, bias, mean, rstd, ctx.silu, of_input, of_weight or of_bias
        )
        dweight = dweight.to(weight.dtype) if of_weight and dweight is not None else None
        dbias = dbias.to(bias.dtype) if of_bias and dbias is not None else None
        return dx, dweight, dbias, None, None, None
