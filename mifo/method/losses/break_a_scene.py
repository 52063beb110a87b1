"""Break-a-Scene's attention loss, a baseline that matches attention to the mask (2305.16311, eq. 2)."""

import torch
from torch import Tensor


def break_a_scene(attention: Tensor, mask: Tensor) -> Tensor:
    """Mean over the map of (A / max A − M)²: attention that fills the mask evenly and leaves the rest.

    The map is averaged over the layers of one resolution first (16×16 on Stable Diffusion), then divided by
    its maximum, since a probability shared among all tokens of a prompt never reaches the mask's 1 by itself.

    Args:
        attention: cross-attention probabilities A of one token, mean over heads and layers, (…, R, R).
        mask: the instance's mask M at that resolution, (…, R, R) in [0, 1].

    Returns:
        (…), one loss per map.
    """
    peak = attention.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(attention.dtype).tiny)
    return (attention / peak - mask).square().mean((-2, -1))
