"""Attention processors of a diffusers U-Net: fused, bounded by a rule, and read.

B samples, n pixels, m keys (pixels or words), d width of a head.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from mifo.acceleration.bounded_attention import bounded_attention, runs_as_kernels
from mifo.acceleration.fused_attention import quick_to_start
from mifo.backbones.attention import Biases, Keep, attention_probabilities
from mifo.method.backbone import Read, Rule, Site


class FusedAttention:
    """Attention that nobody reads and no rule bounds."""

    rule: Rule | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        query, key, value = _heads(attn, hidden_states, encoder_hidden_states)
        bias = _own_mask(attn, attention_mask, key)
        return _merged(attn, self.attend(attn, query, key, value, bias))

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """(B, heads, n, d) of queries (B, heads, n, d), keys and values (B, heads, m, d)."""
        with quick_to_start(min(query.shape[2], key.shape[2])):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attn.scale)


class BoundedAttention(FusedAttention):
    """Attention bounded by a rule, on a GPU without a mask in memory."""

    rule: Rule

    def __init__(self, rule: Rule, bias: Biases) -> None:
        self.rule, self.bias = rule, bias

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        if runs_as_kernels(query, key, value, attn.scale):
            return bounded_attention(query, key, value, *self.rule, attn.scale)
        with quick_to_start(query.shape[2]):
            bias = self.bias(self.rule, query.dtype)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attn.scale)


class ReadAttention(FusedAttention):
    """Attention whose probabilities are computed in the open and in 32 bits, and handed to a site's read."""

    def __init__(self, site: Site, read: Read, keep: Keep, rule: Rule | None, bias: Biases) -> None:
        self.site, self.read, self.keep, self.rule, self.bias = site, read, keep, rule, bias

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        if self.rule is not None:
            bias = self.bias(self.rule, query.dtype)
        probabilities = attention_probabilities(query, key, attn.scale, bias)
        self.keep(self.site, self.read(probabilities))
        return probabilities.to(value.dtype) @ value


def _heads(attn: Any, hidden_states: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, heads, n, d), keys and values (B, heads, m, d); adapters on the projections take part."""
    if context is None:
        context = hidden_states
    elif attn.is_cross_attention and attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    query, key, value = (
        projection(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for projection, states in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
    )
    return (
        query if attn.norm_q is None else attn.norm_q(query),
        key if attn.norm_k is None else attn.norm_k(key),
        value,
    )


def _merged(attn: Any, attended: Tensor) -> Tensor:
    """(B, heads, n, d) to (B, n, width) through the layer's output projection."""
    projection, dropout = attn.to_out
    return dropout(projection(attended.transpose(1, 2).flatten(2))) / attn.rescale_output_factor


def _own_mask(attn: Any, attention_mask: Tensor | None, key: Tensor) -> Tensor | None:
    """The U-Net's own attention mask (B, 1, L), if it was given one, as a bias (B, heads, 1, L)."""
    if attention_mask is None:
        return None
    return attn.prepare_attention_mask(attention_mask, key.shape[2], key.shape[0], out_dim=4)
