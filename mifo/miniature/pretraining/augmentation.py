"""Made pictures are softer, noisier and less straight than drawings; judges learn to look past that."""

import torch
from torch import Tensor
from torch.nn import functional as F

WARP = 0.04
"""Standard deviation of the displacement of pixels, as a share of the picture's side."""


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (n, 3, H, W) in [0, 1], each blurred, tinted and made noisy by amounts of its own."""
    n, device = len(images), images.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(n, *shape, 1, 1, generator=generator, device=device)

    images = torch.lerp(images, F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), uniform(1))
    noise = torch.randn(images.shape, generator=generator, device=device)
    return images * (0.9 + 0.2 * uniform(3)) + 0.05 * uniform(1) * noise


def repaint(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (n, 3, H, W) in [0, 1] with more or less contrast and saturation, up to a quarter."""
    contrast, saturation = (
        0.75 + 0.5 * torch.rand(2, len(images), 1, 1, 1, generator=generator, device=images.device)
    ).unbind()
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast)
    return torch.lerp(images.mean(1, keepdim=True), images, saturation).clamp(0, 1)


def warp(images: Tensor, generator: torch.Generator, knots: int = 5) -> Tensor:
    """Pictures (n, 3, H, W), every other one mirrored, bent by random moves at knots × knots points."""
    n, _, height, width = images.shape
    moves = torch.randn(n, 2, knots, knots, generator=generator, device=images.device) * 2 * WARP
    moves = F.interpolate(moves, (height, width), mode="bicubic", align_corners=True).movedim(1, -1)
    still = torch.eye(2, 3, device=images.device).repeat(n, 1, 1)
    still[:, 0, 0] = torch.randint(2, (n,), generator=generator, device=images.device) * 2.0 - 1
    grid = F.affine_grid(still, list(images.shape), align_corners=False)
    amount = torch.rand(n, 1, 1, 1, generator=generator, device=images.device)
    return F.grid_sample(images, grid + amount * moves, padding_mode="border", align_corners=False)
