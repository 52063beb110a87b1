"""What attention processors here are made of: projection to heads, fused attention, and safe installation."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mifo.backbones.unet.layers import attention_layers

_READY_MADE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_LONG = 1024  # queries and keys from which on cuDNN's kernel earns the time that it takes to be built


def project_heads(
    attn: nn.Module, hidden_states: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one attention layer, one row per head.

    Args:
        attn: the diffusers `Attention` module; adapters on its projections (LoRA) take part.
        hidden_states: (B, R², width).
        context: (B, L, context width), or `None` for self-attention.

    Returns:
        queries (B, heads, R², d), keys and values (B, heads, R² or L, d).
    """
    if context is None:
        context = hidden_states
    return project_queries(attn, hidden_states), *project_context(attn, context)


def project_queries(attn: nn.Module, hidden_states: Tensor) -> Tensor:
    """Queries (B, heads, R², d) of hidden states (B, R², width)."""
    query = _heads(attn, attn.to_q(hidden_states))
    return query if attn.norm_q is None else attn.norm_q(query)


def project_context(attn: nn.Module, context: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, heads, keys, d) of what is attended to, (B, keys, width)."""
    if attn.is_cross_attention and attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    key, value = (_heads(attn, each(context)) for each in (attn.to_k, attn.to_v))
    return key if attn.norm_k is None else attn.norm_k(key), value


def _heads(attn: nn.Module, projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def merge_heads(attn: nn.Module, attended: Tensor) -> Tensor:
    """Bring (B, heads, R², d) back to (B, R², width) through the layer's output projection."""
    projection, dropout = attn.to_out
    return dropout(projection(attended.transpose(1, 2).flatten(2))) / attn.rescale_output_factor


def attention_probabilities(
    attn: nn.Module, query: Tensor, key: Tensor, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale · Q Kᵀ + bias) in 32 bits, also under autocast, for half precision would blur the maps.

    Args:
        query, key: (B, heads, R², d) and (B, heads, R² or L, d).
        bias: added to the scores, broadcastable to the result; −∞ closes a key.

    Returns:
        (B, heads, R², R² or L), float32, rows summing to one.
    """
    with torch.autocast(query.device.type, enabled=False):
        scores = attn.scale * query.float() @ key.float().transpose(-1, -2)
        return (scores if bias is None else scores + bias).softmax(-1)


class FusedAttention:
    """Processor of a layer whose probabilities nobody reads: PyTorch's fused attention."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        query, key, value = project_heads(attn, hidden_states, encoder_hidden_states)
        bias = head_bias(attn, attention_mask, key)
        with quick_to_start(min(query.shape[2], key.shape[2])):
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attn.scale)
        return merge_heads(attn, attended)


def quick_to_start(length: int = 0) -> AbstractContextManager[None]:
    """Fused attention within the `with` block, by cuDNN first where sequences have a great `length`.

    cuDNN builds a kernel for each new shape, forward and backward, which takes it a quarter of a second.
    """
    backends = [SDPBackend.CUDNN_ATTENTION, *_READY_MADE] if length >= _LONG else _READY_MADE
    return sdpa_kernel(backends, set_priority=True)


def head_bias(attn: nn.Module, attention_mask: Tensor | None, key: Tensor) -> Tensor | None:
    """The U-Net's own attention mask (B, 1, L), if it was given one, as a bias (B, heads, 1, L)."""
    if attention_mask is None:
        return None
    return attn.prepare_attention_mask(attention_mask, key.shape[2], key.shape[0], out_dim=4)


@contextmanager
def installed_processors(unet: nn.Module, processors: Mapping[int, object]) -> Iterator[None]:
    """Give every attention layer a processor inside the `with` block and the old ones back after it.

    Args:
        unet: a diffusers `UNet2DConditionModel`.
        processors: processor by `AttentionLayer.index`; layers left out use fused attention.
    """
    before = dict(unet.attn_processors)
    fused = FusedAttention()
    new = {f"{layer.name}.processor": processors.get(layer.index, fused) for layer in attention_layers(unet)}
    try:
        unet.set_attn_processor(new)
        yield
    finally:
        unet.set_attn_processor(before)
