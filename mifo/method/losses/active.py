"""Which attention loss is active when and on which layers, and its sum over layers and instances."""

from collections.abc import Mapping
from math import isqrt
from typing import Literal

import torch
from torch import Tensor

from mifo.backbones.unet.layers import LayerChoice
from mifo.method.losses.break_a_scene import break_a_scene
from mifo.method.losses.masks import resize_masks
from mifo.method.losses.penalty import penalty
from mifo.method.losses.reward import reward
from mifo.method.losses.settings import AttentionTerm, PenaltySettings, TermSettings

Stage = Literal["semantic", "finetuning"]


def active_term(settings: PenaltySettings, stage: Stage, step: int) -> TermSettings:
    """The attention loss of a step (counted from 0 within its stage)."""
    if stage == "finetuning":
        return settings.finetuning
    return settings.warmup if step < settings.warmup_steps else settings.semantic


def layers_read(term: AttentionTerm, stage: Stage, choice: LayerChoice) -> tuple[int, ...]:
    """The layers that a loss reads; Break-a-Scene averages their maps, so its layers have one resolution."""
    if term is AttentionTerm.none:
        return ()
    if stage == "finetuning" or term is AttentionTerm.break_a_scene:
        return choice.finetuning
    return choice.semantic


def timestep_gate(timesteps: Tensor, limit: int) -> Tensor:
    """1.0 for each sample (B,) whose timestep is below the limit, else 0.0; never waits for the device."""
    return (timesteps < limit).float()


def attention_loss(
    term: AttentionTerm, maps: Mapping[int, Tensor], masks: Tensor, valid: Tensor, gate: Tensor
) -> Tensor:
    """Sum of an attention loss over layers and instances, mean over samples.

    Args:
        term: reward and penalty compare each layer with the masks, Break-a-Scene the mean of the layers.
        maps: by layer, cross-attention probabilities of the instances' tokens, (B, R², K), mean over heads.
        masks: (B, K, H, W) in [0, 1].
        valid: (B, K), 1 for an instance that counts and 0 for padding.
        gate: (B,), 1 for a sample that counts, see `timestep_gate`.

    Returns:
        The unweighted loss, a scalar; 0 if there are no maps.
    """
    if term is AttentionTerm.none:
        return masks.new_zeros(())
    attention = {layer: _square(flat) for layer, flat in maps.items()}
    resized = {side: resize_masks(masks, side) for side in {each.shape[-1] for each in attention.values()}}
    if term is AttentionTerm.break_a_scene:
        mean = torch.stack(list(attention.values())).mean(0)
        losses = break_a_scene(mean, resized[mean.shape[-1]])
    else:
        compare = reward if term is AttentionTerm.reward else penalty
        losses = sum(compare(each, resized[each.shape[-1]]) for each in attention.values())
    return (losses * valid * gate[:, None]).sum(1).mean()


def _square(flat: Tensor) -> Tensor:
    """(B, R², K) → (B, K, R, R)."""
    return flat.transpose(1, 2).unflatten(-1, (isqrt(flat.shape[1]), -1))
