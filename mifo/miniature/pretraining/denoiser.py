"""The miniature's UNet2DConditionModel, learned together with its text encoder on the corpus' latents.

With `pretraining.words` captions say a share of the things by one word for each thing, which
`mifo.miniature.pretraining.words` writes from the thing's truth.
"""

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers import Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from mifo.acceleration.compiling import compile_blocks
from mifo.miniature.pretraining.corpus import Corpus
from mifo.miniature.pretraining.settings import PretrainSettings
from mifo.miniature.pretraining.text_encoder import WIDTH
from mifo.miniature.pretraining.training import ReplayedPretraining
from mifo.miniature.pretraining.words import FROM_MEAN, NOISE, SCALES, WordWriter, attributes, rows_of_words
from mifo.world.scenes import SIZE

EMPTY_PROMPTS = 0.1
"""Share of prompts that are emptied, for classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

TEXT_RATE = 0.3
"""Learning rate of the text encoder as a share of the U-Net's."""

WORD_RATE = 3.0
"""Learning rate of the writer of words as a share of the U-Net's."""

THINGS_WEIGHT = 3.0
"""Weight of things in the loss beside 1 of the background, of which they cover a small part.

Only with `pretraining.words`: without, every pixel weighs alike, as for the weights in the repository.
And only where noise leaves the places of things to be seen (t < SEEN): before, it would make things where
there are none.
"""

SEEN = 500

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


class DenoiserPretraining(ReplayedPretraining):
    """ε-prediction with min-SNR weights."""

    part = "denoiser"

    def __init__(
        self,
        corpus: Corpus,
        latents: Tensor,
        text_encoder: CLIPTextModel,
        empty: Tensor,
        settings: PretrainSettings,
        unet: UNet2DConditionModel | None = None,
    ) -> None:
        """``empty`` (L,) holds the ids of the empty prompt; without a ``unet`` a new one learns."""
        super().__init__(Painter(text_encoder, unet or build_unet()), settings.denoiser, settings.seed)
        self.corpus = corpus
        self.latents = latents
        self.writer = WordWriter(WIDTH)
        self.things_weight = THINGS_WEIGHT if settings.words else 1.0
        self.register_buffer("empty", empty, persistent=False)
        self.register_buffer("alphas", build_scheduler().alphas_cumprod, persistent=False)
        self.network.unet.to(memory_format=torch.channels_last)
        self._table = next(
            name for name, _ in self.network.named_parameters() if name.endswith("token_embedding.weight")
        )
        if settings.compile:
            compile_blocks(self.network, ResnetBlock2D, Transformer2DModel)

    def parameter_groups(self) -> list[dict]:
        """The text encoder, which already reads, learns at a lower rate than the U-Net."""
        rate = self.settings.learning_rate
        return [
            {"params": list(self.network.unet.parameters())},
            {"params": list(self.network.text_encoder.parameters()), "lr": TEXT_RATE * rate},
            {"params": list(self.writer.parameters()), "lr": WORD_RATE * rate},
        ]

    def _learned(self) -> list[nn.Parameter]:
        return [*self.network.parameters(), *self.writer.parameters()]

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        device, n = self.device, self.settings.batch_size

        def uniform(*shape: int) -> Tensor:
            return torch.rand(n, *shape, generator=generator, device=device)

        def normal(*shape: int) -> Tensor:
            return torch.randn(n, *shape, generator=generator, device=device)

        rows, variant = self.corpus.pick(n, generator)
        dropped = uniform(1) < EMPTY_PROMPTS
        ids = torch.where(dropped, self.empty, self.corpus.captions[rows, variant])
        slots = torch.where(dropped, -1, self.corpus.slots[rows, variant])
        things = attributes(self.corpus.identities[rows])
        count = things.shape[1]
        low, high = SCALES
        return (
            self.latents[rows].float(),
            normal(*self.latents.shape[1:]),
            torch.randint(1000, (n,), generator=generator, device=device),
            self.corpus.cover[rows].unsqueeze(1) / 255,
            ids,
            slots,
            things,
            low + (high - low) * uniform(count, 1),
            NOISE * uniform(count, 1) * normal(count, WIDTH),
            uniform(*ids.shape[1:]) < FROM_MEAN,
        )

    def objective(
        self,
        clean: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        cover: Tensor,
        ids: Tensor,
        slots: Tensor,
        things: Tensor,
        scales: Tensor,
        disturbances: Tensor,
        around_mean: Tensor,
    ) -> dict[str, Tensor]:
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        offsets = self.writer(things) * scales + disturbances
        said = slots.clamp(min=0).unsqueeze(-1).expand(-1, -1, offsets.shape[-1])
        weights = dict(self.network.named_parameters())
        table = weights[self._table]
        words = rows_of_words(table, ids, offsets.gather(1, said), around_mean)
        # the words of this batch are further rows of the table, as those of learned instances are
        weights[self._table] = torch.cat([table, words.flatten(0, 1)])
        rows = len(table) + torch.arange(ids.numel(), device=ids.device).view_as(ids)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        predicted = self.predict(weights, noisy, timesteps, torch.where(slots >= 0, rows, ids))
        emphasis = 1 + (self.things_weight - 1) * cover * (timesteps < SEEN).view(-1, 1, 1, 1)
        squared = (predicted.float() - noise).pow(2)
        snr = (alpha / (1 - alpha)).flatten()
        losses = (emphasis * squared).mean((1, 2, 3)) * snr.clamp(max=SNR_CAP) / snr
        return {"loss": losses.mean(), "mse": squared.mean()}
