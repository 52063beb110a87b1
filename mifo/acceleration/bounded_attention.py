"""Attention in which a query sees the keys that have a bit in common with it, without a mask in memory.

PyTorch's fused attention reads a number for each pair, n · m of them in place of n + m: a picture takes 10 %
longer with it (`experiments/benchmark/tried.md`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mifo.acceleration.kernels import kernels_take

DTYPES = (torch.float16, torch.bfloat16)
WIDTHS = (16, 32, 64, 128)


def bounded_attention(
    query: Tensor, key: Tensor, value: Tensor, query_bits: Tensor, key_bits: Tensor, scale: float
) -> Tensor:
    """softmax(scale · Q Kᵀ) V over the keys that each query sees, which must be one at least.

    One kernel computes it with probabilities rounded to 16 bits, as flash attention does, and two its
    gradients, of which those of key and value only if they are wanted. They give the same bits at each call,
    and can be captured in a CUDA graph after a first call, which compiles them. Ask `runs_as_kernels` first.

    Args:
        query: (B, heads, n, d), float16 or bfloat16, with a d of `WIDTHS`.
        key, value: (B, heads, m, d), of the same dtype.
        query_bits: int32 (B or 1, n), see `Rule`.
        key_bits: int32 (B or 1, m).
        scale: of the scores, above 0.

    Returns:
        (B, heads, n, d), of the query's dtype; it lies in memory as (B, n, heads, d), so that merging heads
        is a view, and so do the gradients.
    """
    attended: Tensor = _BoundedAttention.apply(query, key, value, query_bits, key_bits, scale)
    return attended


def runs_as_kernels(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """Whether they can run; they look for the highest score before they scale, which must keep the order."""
    batch, heads, _, width = query.shape
    return (
        kernels_take("bounded_attention", query)
        and query.dtype == key.dtype == value.dtype
        and query.dtype in DTYPES
        and key.shape == value.shape == (batch, heads, key.shape[2], width)
        and width in WIDTHS
        and scale > 0
    )


class _BoundedAttention(torch.autograd.Function):
    """Keeps the sum of each query's exponentials, not probabilities, for its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_bits: Tensor,
        key_bits: Tensor,
        scale: float,
    ) -> Tensor:
        from mifo.acceleration.bounded_attention_kernels import attended

        query, key, value = (
            each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value)
        )
        query_bits = query_bits.contiguous().expand(len(query), query.shape[2])
        key_bits = key_bits.contiguous().expand(len(query), key.shape[2])
        known = (query, key, value, query_bits, key_bits)
        y, level = attended(*known, scale)
        ctx.save_for_backward(*known, y, level)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from mifo.acceleration.bounded_attention_kernels import gradients

        dy = dy.transpose(1, 2).contiguous().transpose(1, 2)
        of_context = any(ctx.needs_input_grad[1:3])
        query, key, value, query_bits, key_bits, y, level = ctx.saved_tensors
        found = gradients(dy, query, key, value, query_bits, key_bits, y, level, ctx.scale, of_context)
        return *found, None, None, None
