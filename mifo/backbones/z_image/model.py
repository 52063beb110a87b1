"""Z-Image (arXiv 2511.22699), as diffusers' `ZImagePipeline` has it.

Letters: B samples, L tokens of the longest prompt with its padding, C × h × w latents, n pixels (patches).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mifo.acceleration.graphs import Known
from mifo.backbones.joint.attention import JointAttention, joint_heads, turned
from mifo.backbones.joint.network import JointNetwork
from mifo.backbones.joint.qwen_model import QwenModel
from mifo.backbones.joint.sites import JOINT, PIXELS, joint_sites
from mifo.backbones.qwen import prompt_words
from mifo.method.backbone import Conditioning
from mifo.method.prompts.instances import PromptWords

WHOLE = 32  # tokens: the transformer fills a prompt up with its own padding, which is attended to
PATCH = QwenModel.patch

Count = TypeVar("Count", int, Tensor)


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
    """A `ZImageTransformer2DModel`: pixels attend among themselves, words too, then both together.

    Its layers are called here, on tensors of the whole batch. Its own call takes a list of sequences whose
    lengths are Python's, so that a graph would fix them.
    """

    def __init__(self, transformer: Any, side: int, whole_row: bool) -> None:
        layers = [(f"noise_refiner.{i}.attention", PIXELS) for i in range(len(transformer.noise_refiner))]
        layers += [(f"layers.{i}.attention", JOINT) for i in range(len(transformer.layers))]
        super().__init__(transformer, joint_sites(layers, side), whole_row)
        self.side = side

    def processor_of(self, module: Any) -> type[JointAttention]:
        return StreamAttention

    def forward(self, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer counts time from noise to clean, and predicts the velocity that way."""
        states, lengths = conditioning.parts["states"], conditioning.parts["lengths"]
        # with their padding; in learning, only their greatest length is known
        filled = conditioning.parts.get("filled")
        may_be = {WHOLE, states.shape[1]} if filled is None else {*filled.tolist()}
        states = states[:, : max(may_be)]
        network, place = self.network, partial(torch.arange, device=noisy.device)
        here, rows, words = place(1), place(self.side), place(states.shape[1])
        # words stand at 1 and further, pixels behind the last word of their own prompt
        last, there = here + len(words), None
        if len(may_be) > 1:  # a mask, with which attention is slower
            last = whole(lengths)
            there = words < last[:, None]  # (B, L)
        angles = network.rope_embedder(torch.cartesian_prod(last + 1, rows, rows))
        angles = angles.unflatten(0, (len(last), -1))  # (B or 1, n, numbers of a head / 2)
        word_angles = network.rope_embedder(torch.cartesian_prod(words + 1, here, here))[None]

        time = (1000 - torch.as_tensor(time, device=noisy.device).expand(len(noisy))) / 1000
        level = network.t_embedder(time * network.t_scale).to(states.dtype)
        told = network.cap_embedder(states)
        told = torch.where(words[:, None] < lengths[:, None, None], told, network.cap_pad_token)
        patches = noisy.to(states.dtype).unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, n, PATCH² · C)
        pixels = network.all_x_embedder[f"{PATCH}-1"](patches).to(told.dtype)

        pixels = self._through(network.noise_refiner, pixels, None, angles, level)
        told = self._through(network.context_refiner, told, there, word_angles)
        joint = torch.cat([pixels, told], 1)
        angles = torch.cat([angles, word_angles.expand(len(angles), -1, -1)], 1)
        if there is not None:
            there = F.pad(there, (pixels.shape[1], 0), value=True)
        joint = self._through(network.layers, joint, there, angles, level)
        found = network.all_final_layer[f"{PATCH}-1"](joint, level)[:, : pixels.shape[1]]
        found = found.unflatten(2, (PATCH, PATCH, -1)).unflatten(1, (self.side, self.side))
        return -found.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def _through(self, layers: Iterable[Any], states: Tensor, *others: Tensor | None) -> Tensor:
        """States after some layers, whose activations are computed twice if the network has it so."""
        for layer in layers:
            if self.network.gradient_checkpointing and torch.is_grad_enabled():
                states = self.network._gradient_checkpointing_func(layer, states, *others)
            else:
                states = layer(states, *others)
        return states


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

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Ids (B, 1, L) of the prompts' messages, −1 as padding; L is the longest one's with its padding."""
        ids = super().tokenize(prompts)
        return ids[..., : whole(int((ids >= 0).sum(-1).max()))]

    def encode(self, ids: Tensor) -> Conditioning:
        """States (B, L, width) of ids (B, 1, L) before the last layer, and the prompts' lengths (B,)."""
        ids = ids[:, 0].to(self.device)
        return Conditioning({"states": self.hidden(ids)[-2], "lengths": (ids >= 0).sum(-1)})

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Also the lengths with padding (B,), known on the processor: a pass masks no more than it must."""
        ids = self.tokenize(prompts)
        filled = whole((ids[:, 0] >= 0).sum(-1)).as_subclass(Known)
        return Conditioning({**self.encode(ids).parts, "filled": filled})

    def words(self, prompt: str) -> PromptWords:
        return prompt_words(self.tokenizer, prompt, self.thinking, whole)


def whole(tokens: Count) -> Count:
    """The length of a sequence of so many tokens with its padding."""
    return -(-tokens // WHOLE) * WHOLE
