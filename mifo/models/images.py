"""Pictures to latents and back."""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from mifo.models.loading import DiffusionModel


@torch.no_grad()
def encode_images(model: DiffusionModel, images: Tensor, batch_size: int = 8) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, 4, h, w) of the scaled latents of images (B, 3, H, W) in [0, 1]."""
    scale = model.vae.config.scaling_factor
    posteriors = [
        model.vae.encode(part.to(model.vae.device) * 2 - 1).latent_dist for part in images.split(batch_size)
    ]
    return (
        torch.cat([posterior.mean for posterior in posteriors]) * scale,
        torch.cat([posterior.std for posterior in posteriors]) * scale,
    )


def encode_both_ways(
    model: DiffusionModel, images: Iterable[Tensor], batch_size: int = 8
) -> tuple[Tensor, Tensor]:
    """As `encode_images`, of images (3, H, W) and of their mirror images: (2, B, 4, h, w) each.

    Args:
        images: taken `batch_size` at a time, so that they need not all be in memory.
    """
    images, encoded = iter(images), []
    while part := list(islice(images, batch_size)):
        plain = torch.stack(part).to(model.vae.device)
        both = encode_images(model, torch.cat([plain, plain.flip(-1)]), 2 * batch_size)
        encoded.append([each.unflatten(0, (2, -1)) for each in both])
    means, deviations = zip(*encoded, strict=True)
    return torch.cat(means, 1), torch.cat(deviations, 1)


@torch.no_grad()
def decode_latents(model: DiffusionModel, latents: Tensor, batch_size: int = 4) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of scaled latents (B, 4, h, w)."""
    parts = (latents.to(model.vae.dtype) / model.vae.config.scaling_factor).split(batch_size)
    return torch.cat([model.vae.decode(part).sample.float() for part in parts]).div(2).add(0.5).clamp(0, 1)
