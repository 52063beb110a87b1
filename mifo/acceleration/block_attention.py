"""Attention in which a query sees the keys that have a bit in common with it, by FlexAttention's block masks.

For long sequences: blocks of 128 queries and keys that do not see each other cost nothing.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mifo.acceleration.compiling import compiled

SHORT = 1024  # the mask of a shorter sequence takes less than 2 MiB a sample, and no kernel to be compiled


def runs_in_blocks(query: Tensor) -> bool:
    """Whether queries (B, heads, n, d) are worth the blocks' kernel, and it takes them."""
    length, width = query.shape[-2:]
    fits = width >= 16 and width & (width - 1) == 0 and query.dtype != torch.float64
    return query.is_cuda and length >= SHORT and fits


def block_mask(query_bits: Tensor, key_bits: Tensor, samples: int) -> BlockMask:
    """Which blocks of queries see which blocks of keys, in each of B samples.

    Args:
        query_bits: integers (B or 1, n). key_bits: integers (B or 1, m).
    """
    query_bits, key_bits = (bits.expand(samples, -1).contiguous() for bits in (query_bits, key_bits))

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query_bits[row, query] & key_bits[row, key] != 0

    lengths = query_bits.shape[1], key_bits.shape[1]
    return create_block_mask(sees, samples, None, *lengths, device=query_bits.device)


def block_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """softmax(scale · Q Kᵀ) V over the keys that each query sees; on a GPU by a kernel that is compiled once.

    Args:
        query: (B, heads, n, d). key, value: (B, heads, m, d), of the query's dtype.

    Returns:
        (B, heads, n, d).
    """
    attend = compiled(flex_attention) if query.is_cuda else flex_attention
    attended: Tensor = attend(query, key, value, block_mask=mask, scale=scale)
    return attended
