"""MOSAIC's disentanglement loss: instances attend to different places (arXiv 2509.01977)."""

from torch import Tensor

from mifo.method.losses.attention_loss import AttentionLoss, Maps, Masks
from mifo.method.losses.maps import mean_map

LEAST = 1e-8  # of a share of attention, so that the divergence of maps that nowhere meet is finite


class Divergence(AttentionLoss):
    """−1/(K·(K − 1)) · Σ_{j ≠ i} ½·(KL(aᵢ ‖ aⱼ) + KL(aⱼ ‖ aᵢ)); the sum over i is the paper's loss.

    aᵢ is the mean map over sites, divided by its sum. In the paper it is the attention of a *reference
    picture* over the target's pixels; here it is the word's. Masks serve only to tell which of the K entries
    are instances. One instance alone has the loss 0. The paper's second loss, on corresponding points of
    reference and target, has no counterpart without references.
    """

    one_size = True

    def __call__(self, maps: Maps, masks: Masks) -> Tensor:
        """(B, K), at most 0, at least −18.5 / K."""
        attention = mean_map(maps).flatten(2)  # (B, K, n)
        shares = (attention / attention.sum(-1, keepdim=True).clamp_min(LEAST)).clamp_min(LEAST)
        crossed = shares @ shares.log().transpose(1, 2)  # Σ aᵢ·log aⱼ, (B, K, K)
        own = crossed.diagonal(dim1=1, dim2=2)
        distance = (own[:, :, None] + own[:, None, :] - crossed - crossed.transpose(1, 2)) / 2
        present = (masks[next(iter(maps)).size].amax((-2, -1)) > 0).float()  # padding has no mask
        number = present.sum(1, keepdim=True)
        others = (distance * present[:, None, :]).sum(-1) * present
        return -others / (number * (number - 1)).clamp_min(1)
