"""The miniature's SD3Transformer2DModel, learned with two text encoders on the corpus' latents.

It draws on the same latents as the U-Net, and its first text encoder starts from the U-Net's.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mifo.acceleration.compiling import compile_blocks
from mifo.backbones.schedulers import flow_of
from mifo.miniature.pretraining.corpus import Corpus
from mifo.miniature.pretraining.denoiser import EMPTY_PROMPTS, TEXT_RATE
from mifo.miniature.pretraining.settings import PretrainSettings
from mifo.miniature.pretraining.text_encoder import WIDTH, build_text_encoder
from mifo.miniature.pretraining.training import ReplayedPretraining
from mifo.world.scenes import SIZE

SECOND_WIDTH = 96
"""Width of the second text encoder's states."""

HEADS, HEAD_WIDTH, BLOCKS = 6, 32, 9


def build_transformer() -> SD3Transformer2DModel:
    """Stable Diffusion 3.5's plan, small: joint blocks on 16×16 patches, with normed queries and keys.

    It starts as DiT does (arXiv 2212.09748): every block gives nothing, and the prediction is 0.
    """
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH + SECOND_WIDTH,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        pooled_projection_dim=WIDTH + SECOND_WIDTH,
        pos_embed_max_size=SIZE // 8,
        qk_norm="rms_norm",
    )
    modulated = [transformer.norm_out, *(b.norm1 for b in transformer.transformer_blocks)]
    modulated += [block.norm1_context for block in transformer.transformer_blocks]
    for linear in (transformer.proj_out, *(norm.linear for norm in modulated)):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def build_text_encoders(tokenizer) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """The U-Net's text encoder with a projection, and a second of half its width and depth."""
    first = build_text_encoder(tokenizer).config.to_dict()
    second = first | {
        "hidden_size": SECOND_WIDTH,
        "intermediate_size": 4 * SECOND_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "projection_dim": SECOND_WIDTH,
    }
    made = [CLIPTextModelWithProjection(CLIPTextConfig(**config)) for config in (first, second)]
    return made[0], made[1]


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Without a shift, which larger pictures need."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


class FlowPainter(nn.Module):
    """Two text encoders and the transformer, one network for one optimiser."""

    def __init__(self, tokenizer) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = build_text_encoders(tokenizer)
        self.transformer = build_transformer()

    def start_from(self, text_encoder: CLIPTextModel) -> None:
        """Take over the weights of a text encoder without a projection."""
        known = {name.removeprefix("text_model."): each for name, each in text_encoder.state_dict().items()}
        own = self.text_encoder.text_model
        own.load_state_dict({name: known[name.removeprefix("text_model.")] for name in own.state_dict()})

    def forward(self, latents: Tensor, times: Tensor, ids: Tensor) -> Tensor:
        both = [each(ids, output_hidden_states=True) for each in (self.text_encoder, self.text_encoder_2)]
        states = torch.cat([each.hidden_states[-2] for each in both], -1)
        pooled = torch.cat([each.text_embeds for each in both], -1)
        return self.transformer(latents, states, pooled, times, return_dict=False)[0]


class TransformerPretraining(ReplayedPretraining):
    """Rectified flow: the velocity at times that are drawn logit-normally (arXiv 2403.03206)."""

    part = "transformer"

    def __init__(
        self,
        corpus: Corpus,
        latents: Tensor,
        text_encoder: CLIPTextModel,
        tokenizer,
        settings: PretrainSettings,
    ) -> None:
        """``text_encoder`` is what the first text encoder starts from."""
        network = FlowPainter(tokenizer)
        network.start_from(text_encoder)
        super().__init__(network, settings.transformer, settings.seed)
        self.corpus, self.latents = corpus, latents
        self.flow = flow_of(build_flow_scheduler())
        empty = torch.tensor(tokenizer("", padding="max_length").input_ids)
        self.register_buffer("empty", empty, persistent=False)
        if settings.compile:
            compile_blocks(self.network, JointTransformerBlock)

    def parameter_groups(self) -> list[dict]:
        """The first text encoder, which already reads, learns at a lower rate."""
        network, rate = self.network, self.settings.learning_rate
        return [
            {"params": [*network.transformer.parameters(), *network.text_encoder_2.parameters()]},
            {"params": list(network.text_encoder.parameters()), "lr": TEXT_RATE * rate},
        ]

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        device, n = self.device, self.settings.batch_size
        rows, variant = self.corpus.pick(n, generator)
        dropped = torch.rand(n, 1, generator=generator, device=device) < EMPTY_PROMPTS
        noise = torch.randn(n, *self.latents.shape[1:], generator=generator, device=device)
        times = torch.randn(n, generator=generator, device=device).sigmoid() * self.flow.length
        ids = torch.where(dropped, self.empty, self.corpus.captions[rows, variant])
        return self.latents[rows].float(), noise, times, ids

    def objective(self, clean: Tensor, noise: Tensor, times: Tensor, ids: Tensor) -> dict[str, Tensor]:
        noisy = self.flow.add_noise(clean, noise, times)
        velocity = self.predict(dict(self.network.named_parameters()), noisy, times, ids)
        return {"loss": F.mse_loss(velocity.float(), self.flow.target(clean, noise, times))}
