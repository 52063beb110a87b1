"""The attention of a diffusers `Flux2Transformer2DModel`, in which words come before pixels."""

from typing import Any

import torch
from torch import Tensor

from mifo.backbones.joint.attention import JointAttention, joint_heads, turned

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines (L + n, d) of the places of words and pixels, each twice."""


class DoubleAttention(JointAttention):
    """Of the blocks in which words and pixels have projections of their own."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None,
        image_rotary_emb: Rotation,
    ) -> tuple[Tensor, Tensor]:
        order = self.rules.words_first
        query, key, value = joint_heads(attn, hidden_states, encoder_hidden_states, order)
        query, key = (turned(each, _angles(image_rotary_emb)) for each in (query, key))
        attended = self.joined(attn, query, key, value)
        projection, dropout = attn.to_out
        out = dropout(projection(attended[:, self.place("pixels")]))
        return out, attn.to_add_out(attended[:, self.place("words")])


class SingleAttention(JointAttention):
    """Of the blocks of one stream, whose projections are those of a feed-forward network too."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        image_rotary_emb: Rotation,
    ) -> Tensor:
        qkv, beside = attn.to_qkv_mlp_proj(hidden_states).split(
            [3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor], -1
        )
        query, key, value = qkv.unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = (
            turned(norm(each), _angles(image_rotary_emb))
            for norm, each in ((attn.norm_q, query), (attn.norm_k, key))
        )
        attended = self.joined(attn, query, key, value)
        out: Tensor = attn.to_out(torch.cat([attended, attn.mlp_act_fn(beside)], -1))
        return out


def _angles(rotation: Rotation) -> Tensor:
    """The rotations as complex numbers (1, L + n, d / 2)."""
    cosines, sines = rotation
    return torch.complex(cosines[None, :, ::2], sines[None, :, ::2])
