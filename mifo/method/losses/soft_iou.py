"""A loss after CRAFT's soft-IoU consistency: each site's map covers the instance (arXiv 2608.14403)."""

import torch
from torch import Tensor

from mifo.method.losses.attention_loss import AttentionLoss, Maps, Masks
from mifo.method.losses.maps import filled


class SoftIoU(AttentionLoss):
    """1 − Σ Â·M / (Σ Â + Σ M − Σ Â·M), mean over sites, Â being one site's map divided by its maximum.

    It departs from the paper, whose exact formula we could not read: there the soft IoU compares where noise
    and where a phrase attend in a reference picture, as a reward of sampled pictures; here there are no
    references, and the word's map is compared with the known mask. Sites count one by one, as there.
    """

    def __call__(self, maps: Maps, masks: Masks) -> Tensor:
        """(B, K), in [0, 1]."""
        losses = []
        for site, each in maps.items():
            attention, mask = filled(each), masks[site.size]
            both = (attention * mask).sum((-2, -1))
            either = attention.sum((-2, -1)) + mask.sum((-2, -1)) - both
            losses.append(1 - both / either.clamp_min(torch.finfo(either.dtype).tiny))
        return torch.stack(losses).mean(0)
