"""The miniature's UNet2DConditionModel, learned together with its text encoder on the corpus' latents."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers import Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from mifo.miniature.pretraining.corpus import Corpus
from mifo.miniature.pretraining.settings import PretrainSettings
from mifo.miniature.pretraining.text_encoder import WIDTH
from mifo.miniature.pretraining.training import Pretraining
from mifo.world.scenes import SIZE

EMPTY_PROMPTS = 0.1
"""Share of prompts that are emptied, for classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

TEXT_RATE = 0.3
"""Learning rate of the text encoder as a share of the U-Net's."""

SNR_CAP = 5.0
"""γ of min-SNR weighting (Hang et al., arXiv 2303.09556)."""


def build_unet() -> UNet2DConditionModel:
    """Stable Diffusion's plan with three levels: attention at 32² and 16², in the lowest only in mid (8²)."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 256),
        layers_per_block=1,
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
        norm_num_groups=32,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=0,
        prediction_type="epsilon",
    )


class Painter(nn.Module):
    """Text encoder and U-Net, one network for one optimiser."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, latents: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self.unet(latents, timesteps, self.text_encoder(ids).last_hidden_state).sample


class DenoiserPretraining(Pretraining):
    """ε-prediction with min-SNR weights."""

    part = "denoiser"

    def __init__(
        self,
        corpus: Corpus,
        latents: Tensor,
        text_encoder: CLIPTextModel,
        empty: Tensor,
        settings: PretrainSettings,
    ) -> None:
        super().__init__(Painter(text_encoder, build_unet()), settings.denoiser, settings.seed)
        self.corpus = corpus
        self.latents = latents
        self.register_buffer("empty", empty, persistent=False)
        self.register_buffer("alphas", build_scheduler().alphas_cumprod, persistent=False)
        self.network.unet.to(memory_format=torch.channels_last)
        if settings.compile:
            # Block by block: the same speed as the whole network, in a third of the compilation time.
            torch._dynamo.config.recompile_limit = 64
            for block in self.network.unet.modules():
                if isinstance(block, (ResnetBlock2D, Transformer2DModel)):
                    block.compile(dynamic=False)

    def predict(self, latents: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """ε̂ with bf16 copies of the fp32 weights on a GPU: autocast would run every normalisation in fp32."""
        if self.device.type != "cuda":
            return self.network(latents, timesteps, ids)
        half = {name: weight.bfloat16() for name, weight in self.network.named_parameters()}
        with torch.autocast("cuda", enabled=False):
            return torch.func.functional_call(self.network, half, (latents.bfloat16(), timesteps, ids))

    def parameter_groups(self) -> list[dict]:
        """The text encoder, which already reads, learns at a lower rate than the U-Net."""
        rate = self.settings.learning_rate
        return [
            {"params": list(self.network.unet.parameters())},
            {"params": list(self.network.text_encoder.parameters()), "lr": TEXT_RATE * rate},
        ]

    def loss(self, generator: torch.Generator) -> dict[str, Tensor]:
        device, n = self.device, self.settings.batch_size
        rows = torch.randint(len(self.corpus), (n,), generator=generator, device=device)
        variant = torch.randint(self.corpus.captions.shape[1], (n,), generator=generator, device=device)
        ids = self.corpus.captions[rows, variant]
        dropped = torch.rand(n, 1, generator=generator, device=device) < EMPTY_PROMPTS
        ids = torch.where(dropped, self.empty, ids)
        clean = self.latents[rows].float()
        noise = torch.randn(clean.shape, generator=generator, device=device)
        timesteps = torch.randint(1000, (n,), generator=generator, device=device)
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        predicted = self.predict(noisy.contiguous(memory_format=torch.channels_last), timesteps, ids)
        squared = (predicted.float() - noise).pow(2).mean((1, 2, 3))
        snr = (alpha / (1 - alpha)).flatten()
        return {"loss": (squared * snr.clamp(max=SNR_CAP) / snr).mean(), "mse": squared.mean()}
