"""The denoising loss, whole or inside masks."""

import torch
from torch import Tensor
from torch.nn import functional as F


def union_mask(masks: Tensor, valid: Tensor, size: tuple[int, int]) -> Tensor:
    """Union of the instances of each sample at the size of the latents.

    Args:
        masks: (B, K, H, W) in [0, 1]; they may overlap.
        valid: (B, K), 1 for an instance that counts and 0 for padding.
        size: (h, w) of the latents; masks are brought to it by their nearest pixel.

    Returns:
        (B, 1, h, w) in [0, 1].
    """
    return F.interpolate((masks * valid[:, :, None, None]).amax(1, keepdim=True), size=size, mode="nearest")


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
