"""Instance masks at the resolutions of the attention maps."""

from torch import Tensor
from torch.nn import functional as F


def resize_masks(masks: Tensor, side: int) -> Tensor:
    """Bring (B, K, H, W) masks in [0, 1] to (B, K, side, side), bilinear.

    Without antialiasing, as in MIFO: antialiased masks move the attention loss by up to a tenth.
    """
    return F.interpolate(masks, size=(side, side), mode="bilinear", antialias=False)
