"""What losses make of attention maps before they compare them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mifo.method.backbone import Site


def mean_map(maps: Mapping[Site, Tensor]) -> Tensor:
    """The mean over sites of one size, (B, K, h, w)."""
    return torch.stack(list(maps.values())).mean(0)


def filled(attention: Tensor) -> Tensor:
    """Maps (B, K, h, w) divided by their maxima, since a word shares each pixel with others: in [0, 1]."""
    peak = attention.amax((-2, -1), keepdim=True)
    return attention / peak.clamp_min(torch.finfo(attention.dtype).tiny)
