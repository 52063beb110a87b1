"""Break-a-Scene's attention loss, a baseline that matches attention to the mask (2305.16311, eq. 2)."""

from torch import Tensor

from mifo.method.losses.attention_loss import AttentionLoss, Maps, Masks
from mifo.method.losses.maps import filled, mean_map


class BreakAScene(AttentionLoss):
    """(A / max A − M)², mean over the map: attention that fills the mask M evenly and leaves the rest.

    A is the mean over sites of one size (16×16 on Stable Diffusion), divided by its maximum, since a
    probability shared among all words of a prompt never reaches the mask's 1 by itself.
    """

    one_size = True

    def __call__(self, maps: Maps, masks: Masks) -> Tensor:
        """(B, K)."""
        return (filled(mean_map(maps)) - masks[next(iter(maps)).size]).square().mean((-2, -1))
