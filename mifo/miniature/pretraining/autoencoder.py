"""The miniature's AutoencoderKL: 128² pictures ↔ 32×32×4 latents."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from mifo.miniature.pretraining.corpus import Corpus
from mifo.miniature.pretraining.settings import PretrainSettings
from mifo.miniature.pretraining.training import Pretraining
from mifo.world.scenes import SIZE

KL_WEIGHT = 1e-5
"""Weight of the KL term per latent element: it only keeps the latents near unit size."""

ABSOLUTE_WEIGHT = 0.02
"""Weight of the absolute error beside the squared one, for crisp edges."""


def build_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIZE,
    )


class AutoencoderPretraining(Pretraining):
    """Squared error with a little absolute error for crisp edges, and a weak KL term."""

    part = "autoencoder"

    def __init__(self, corpus: Corpus, settings: PretrainSettings) -> None:
        super().__init__(build_autoencoder(), settings.autoencoder, settings.seed)
        self.corpus = corpus
        self.run = torch.compile(self.reconstruct) if settings.compile else self.reconstruct

    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.network.encode(images).latent_dist
        decoded = self.network.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return decoded.float(), kl

    def loss(self, generator: torch.Generator) -> dict[str, Tensor]:
        images = _draw(self.corpus, self.settings.batch_size, generator)
        noise = torch.randn(len(images), 4, SIZE // 4, SIZE // 4, generator=generator, device=self.device)
        decoded, kl = self.run(images, noise)
        compared = _compare(decoded, images)
        return {**compared, "loss": compared["loss"] + KL_WEIGHT * kl, "kl": kl}


class DecoderPretraining(Pretraining):
    """The finished autoencoder's decoder alone, on the latents as they are used: means, without noise.

    The encoder stays, and with it the latents, so that the denoiser can be trained at the same time.
    """

    part = "decoder"

    def __init__(self, corpus: Corpus, autoencoder: AutoencoderKL, settings: PretrainSettings) -> None:
        autoencoder.encoder.requires_grad_(False)
        autoencoder.quant_conv.requires_grad_(False)
        super().__init__(autoencoder, settings.decoder, settings.seed)
        self.corpus = corpus
        self.run = torch.compile(self.decode) if settings.compile else self.decode

    def decode(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents).sample.float()

    def loss(self, generator: torch.Generator) -> dict[str, Tensor]:
        images = _draw(self.corpus, self.settings.batch_size, generator)
        with torch.no_grad():
            latents = self.network.encode(images).latent_dist.mean
        return _compare(self.run(latents), images)


def _draw(corpus: Corpus, n: int, generator: torch.Generator) -> Tensor:
    """n pictures (n, 3, H, W) of the corpus in [-1, 1], channels last."""
    rows = torch.randint(len(corpus), (n,), generator=generator, device=generator.device)
    return (corpus.images[rows].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _compare(decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Squared error with a little absolute error; PSNR in dB, whose peak is 2 for pixels in [-1, 1]."""
    squared = F.mse_loss(decoded, images)
    loss = squared + ABSOLUTE_WEIGHT * F.l1_loss(decoded, images)
    return {"loss": loss, "psnr": 10 * torch.log10(4 / squared)}


@torch.no_grad()
def encode_corpus(vae: AutoencoderKL, corpus: Corpus, batch: int = 256) -> tuple[Tensor, float]:
    """Half-precision latent means (n, 4, 32, 32) of all scenes, and the factor to unit variance."""
    latents = [
        vae.encode(corpus.images[i : i + batch].float() / 127.5 - 1).latent_dist.mean.half()
        for i in range(0, len(corpus), batch)
    ]
    stacked = torch.cat(latents)
    return stacked, 1.0 / stacked[:: max(1, len(stacked) // 4096)].float().std().item()
