"""MultiCrafter's attention loss: Dice between a subject's map and its mask (arXiv 2509.21953)."""

from torch import Tensor

from mifo.method.losses.attention_loss import AttentionLoss, Maps, Masks
from mifo.method.losses.maps import filled, mean_map

SMOOTHING = 1e-6  # ε; the paper's value is not known to us


class Dice(AttentionLoss):
    """1 − (2·Σ Â·M + ε) / (Σ Â + Σ M + ε), Â the mean map over sites, divided by its maximum.

    The paper averages the maps of a subject's *reference picture* over all double blocks and normalises the
    mean, in a way that we could not read; here the map is the word's, and Break-a-Scene's way is taken.
    """

    one_size = True

    def __call__(self, maps: Maps, masks: Masks) -> Tensor:
        """(B, K), in [0, 1]."""
        attention, mask = filled(mean_map(maps)), masks[next(iter(maps)).size]
        both = (attention * mask).sum((-2, -1))
        either = attention.sum((-2, -1)) + mask.sum((-2, -1))
        return 1 - (2 * both + SMOOTHING) / (either + SMOOTHING)
