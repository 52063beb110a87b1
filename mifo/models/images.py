"""Pictures to latents and back."""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from mifo.errors import MifoError
from mifo.models.loading import DiffusionModel


@torch.no_grad()
def encode_images(
    model: DiffusionModel, images: Iterable[Tensor], batch_size: int = 8
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, 4, h, w) of the scaled latents of images (B, 3, H, W) in [0, 1].

    Args:
        images: taken `batch_size` at a time, so that they need not all be in memory.
    """
    scale, device = model.vae.config.scaling_factor, model.vae.device
    images, posteriors = iter(images), []
    while part := list(islice(images, batch_size)):
        inputs = torch.stack(part).to(device) * 2 - 1
        posteriors.append(model.vae.encode(inputs).latent_dist)
    return (
        torch.cat([posterior.mean for posterior in posteriors]) * scale,
        torch.cat([posterior.std for posterior in posteriors]) * scale,
    )


@torch.no_grad()
def decode_latents(model: DiffusionModel, latents: Tensor, batch_size: int = 4) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of scaled latents (B, 4, h, w).

    Raises:
        MifoError: a pixel is NaN or infinite.
    """
    parts = (latents.to(model.vae.dtype) / model.vae.config.scaling_factor).split(batch_size)
    images = torch.cat([model.vae.decode(part).sample.float() for part in parts])
    if not images.isfinite().all():
        raise MifoError(
            f"the VAE of {model.name} gives pixels that are not finite in {model.vae.dtype}; take "
            "model.dtype=float32 and performance.synthesis_precision=float32"
        )
    return images.div(2).add(0.5).clamp(0, 1)
