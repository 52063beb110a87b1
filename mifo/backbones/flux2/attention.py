"""The attention of a diffusers `Flux2Transformer2DModel`, in which words come before pixels."""

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from mifo.backbones.joint.attention import JointAttention, joint_heads

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines (L + n, d) of the places of words and pixels."""


class DoubleAttention(JointAttention):
    """Of the blocks in which words and pixels have projections of their own."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
    ) -> tuple[Tensor, Tensor]:
        query, key, value = joint_heads(attn, hidden_states, encoder_hidden_states)
        turned = tuple(_swapped(each, encoder_hidden_states.shape[1], 0) for each in image_rotary_emb or ())
        query, key = (apply_rotary_emb(each, turned) for each in (query, key))
        attended = self.joined(attn, query, key, value)
        projection, dropout = attn.to_out
        out = dropout(projection(attended[:, : self.pixels]))
        return out, attn.to_add_out(attended[:, self.pixels :])


class SingleAttention(JointAttention):
    """Of the blocks of one stream, whose projections are those of a feed-forward network too."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
    ) -> Tensor:
        words = hidden_states.shape[1] - self.pixels
        qkv, beside = attn.to_qkv_mlp_proj(hidden_states).split(
            [3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor], -1
        )
        query, key, value = qkv.unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = (
            apply_rotary_emb(norm(each), image_rotary_emb)
            for norm, each in ((attn.norm_q, query), (attn.norm_k, key))
        )
        query, key, value = (_swapped(each, words, 2) for each in (query, key, value))
        attended = _swapped(self.joined(attn, query, key, value), self.pixels, 1)
        out: Tensor = attn.to_out(torch.cat([attended, attn.mlp_act_fn(beside)], -1))
        return out


def _swapped(sequence: Tensor, first: int, dimension: int) -> Tensor:
    """The `first` entries behind the others."""
    count = sequence.shape[dimension]
    return torch.cat(sequence.split([first, count - first], dimension)[::-1], dimension)
