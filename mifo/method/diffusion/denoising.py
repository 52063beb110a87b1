"""The denoising loss, whole or inside masks."""

import torch
from torch import Tensor


def denoising_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """MSE(ε̂·U, ε·U), the mean over all elements, also those outside the mask U (arXiv 2305.16311, eq. 1).

    Args:
        prediction, target: (B, C, h, w); compared in 32 bits.
        mask: (B, 1, h, w) in [0, 1], or `None` for the plain loss.

    Returns:
        A scalar.
    """
    error = prediction.float() - target.float()
    return torch.mean((error if mask is None else error * mask).square())
