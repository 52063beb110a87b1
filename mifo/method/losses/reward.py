"""MIFO's reward, which teaches a new word where its instance is (arXiv 2511.00542)."""

from torch import Tensor


def reward(attention: Tensor, mask: Tensor) -> Tensor:
    """Mean over the map of (0.5·M − A)²: half of each pixel's attention inside the mask, none outside.

    Args:
        attention: cross-attention probabilities A of one token, mean over heads, (…, R, R) in [0, 1].
        mask: the instance's mask M at that resolution, (…, R, R) in [0, 1].

    Returns:
        (…), one loss per map.
    """
    return (0.5 * mask - attention).square().mean((-2, -1))
