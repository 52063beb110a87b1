"""MIFO's reward, which teaches a new word where its instance is (arXiv 2511.00542)."""

from functools import reduce

import torch
from torch import Tensor

from mifo.method.losses.attention_loss import AttentionLoss, Maps, Masks


class Reward(AttentionLoss):
    """(0.5·M − A)², mean over the map: half of each pixel's attention inside the mask M, none outside."""

    def __call__(self, maps: Maps, masks: Masks) -> Tensor:
        """Summed over sites, (B, K)."""
        losses = [(0.5 * masks[site.size] - a).square().mean((-2, -1)) for site, a in maps.items()]
        return reduce(torch.add, losses)
