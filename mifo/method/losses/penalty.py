"""MIFO's penalty, which only forbids a word to attend outside its instance (arXiv 2511.00542)."""

from functools import reduce

import torch
from torch import Tensor

from mifo.method.losses.attention_loss import AttentionLoss, Maps, Masks


class Penalty(AttentionLoss):
    """(A·(1 − M))², mean over the map: inside the mask M the word attends as it likes and stays editable."""

    def __call__(self, maps: Maps, masks: Masks) -> Tensor:
        """Summed over sites, (B, K)."""
        losses = [(a * (1 - masks[site.size])).square().mean((-2, -1)) for site, a in maps.items()]
        return reduce(torch.add, losses)
