"""Z-Image (arXiv 2511.22699), as diffusers' `ZImagePipeline` has it.

Letters: B samples, L tokens of the longest prompt of a batch, C × h × w latents, n pixels (patches).
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mifo.backbones.joint.attention import JointAttention, joint_heads, turned
from mifo.backbones.joint.network import JointNetwork
from mifo.backbones.joint.qwen_model import QwenModel
from mifo.backbones.joint.sites import JOINT, PIXELS, joint_sites
from mifo.backbones.qwen import prompt_words
from mifo.method.backbone import Conditioning
from mifo.method.prompts.instances import PromptWords

WHOLE = 32  # tokens: the transformer fills a prompt up with its own padding, which is attended to


class StreamAttention(JointAttention):
    """Of a sequence of pixels and words, or of pixels alone; shorter prompts of a batch are padded."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        query, key, value = joint_heads(attn, hidden_states, None)
        if freqs_cis is not None:
            query, key = (turned(each, freqs_cis) for each in (query, key))
        padding = None
        if attention_mask is not None:
            padding = value.new_zeros(attention_mask.shape).masked_fill(~attention_mask, -torch.inf)
            padding = padding[:, None, None]
        out: Tensor = attn.to_out[0](self.joined(attn, query, key, value, padding))
        return out


class ZImageNetwork(JointNetwork):
    """A `ZImageTransformer2DModel`: pixels attend among themselves, words too, then both together."""

    def __init__(self, transformer: Any, side: int, whole_row: bool) -> None:
        layers = [(f"noise_refiner.{i}.attention", PIXELS) for i in range(len(transformer.noise_refiner))]
        layers += [(f"layers.{i}.attention", JOINT) for i in range(len(transformer.layers))]
        super().__init__(transformer, joint_sites(layers, side), whole_row)

    def processor_of(self, module: Any) -> type[JointAttention]:
        return StreamAttention

    def forward(self, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer counts time from noise to clean, and predicts the velocity that way."""
        _refuse_graphs()
        states, lengths = conditioning.parts["states"], conditioning.parts["lengths"]
        predicted = self.network(
            list(noisy.to(states.dtype)[:, :, None]),
            (1000 - torch.as_tensor(time, device=noisy.device).expand(len(noisy))) / 1000,
            [each[:length] for each, length in zip(states, lengths.tolist(), strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(predicted)[:, :, 0]


@dataclass(kw_only=True)
class ZImageModel(QwenModel):
    """The latents' pixels are the autoencoder's; the transformer cuts patches itself."""

    keys_and_values = re.compile(r"^layers\.\d+\.attention\.to_[kv]\.weight$")
    thinking = True
    multiple = 8  # patches are a multiple of `WHOLE`, so that none is padding

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokenizer.padding_side = "right"  # padding is left out, wherever it stands

    @cached_property
    def attentive(self) -> ZImageNetwork:
        return ZImageNetwork(self.transformer, self.patches, self.whole_row)

    def shift_level(self, steps: int) -> float:
        """On a line between two sizes of pictures."""
        config = self.noise_scheduler.config
        small, large = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        level: float = low + (high - low) / (large - small) * (self.patches**2 - small)
        return level

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.patches * self.patch
        return self.transformer.config.in_channels, side, side

    def encode(self, ids: Tensor) -> Conditioning:
        """States (B, L, width) of ids (B, 1, `TOKENS`) before the last layer, and the prompts' lengths (B,).

        The lengths are on the processor, where the transformer's sequences are made.
        """
        _refuse_graphs()
        lengths = (ids[:, 0] >= 0).sum(-1).cpu()
        longest = whole(int(lengths.max()))
        return Conditioning({"states": self.hidden(ids[:, 0, :longest])[-2], "lengths": lengths})

    def words(self, prompt: str) -> PromptWords:
        return prompt_words(self.tokenizer, prompt, self.thinking, whole)


def whole(tokens: int) -> int:
    """The length of a sequence of so many tokens with its padding."""
    return -(-tokens // WHOLE) * WHOLE


def _refuse_graphs() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("Z-Image's prompts have lengths of their own, which a graph would fix")
