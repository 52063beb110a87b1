"""Stable Diffusion 3 and 3.5: a transformer of joint attention over pixels and words (arXiv 2403.03206).

Letters: B samples, E text encoders, L tokens.
"""

import re
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import cached_property
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional as F
from transformers import T5EncoderModel, T5Tokenizer

from mifo.backbones.configs import Config, Configs
from mifo.backbones.joint.attention import JointAttention, joint_heads
from mifo.backbones.joint.model import JointModel
from mifo.backbones.joint.network import JointNetwork
from mifo.backbones.joint.sites import JOINT, PIXELS, joint_sites
from mifo.backbones.settings import ModelSettings
from mifo.method.backbone import Conditioning
from mifo.method.prompts.instances import PromptWords

T5_TOKENS = 256  # diffusers' `max_sequence_length`


class SD3Attention(JointAttention):
    """Over pixels and words, or over pixels alone where the layer is given no words."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        attended = self.joined(attn, *joint_heads(attn, hidden_states, encoder_hidden_states))
        projection, dropout = attn.to_out
        out = dropout(projection(attended[:, : self.pixels]))
        if encoder_hidden_states is None:
            return out
        words = attended[:, self.pixels :]
        return out, words if attn.context_pre_only else attn.to_add_out(words)


class AttentiveTransformer(JointNetwork):
    """Stable Diffusion 3.5's first blocks attend a second time, among pixels alone."""

    def __init__(self, transformer: SD3Transformer2DModel, whole_row: bool) -> None:
        layers = []
        for number, block in enumerate(transformer.transformer_blocks):
            layers.append((f"transformer_blocks.{number}.attn", JOINT))
            if block.attn2 is not None:
                layers.append((f"transformer_blocks.{number}.attn2", PIXELS))
        side = transformer.config.sample_size // transformer.config.patch_size
        super().__init__(transformer, joint_sites(layers, side), whole_row)

    def forward(self, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        states = conditioning.parts["states"]
        return self.network(
            noisy.to(states.dtype),
            states,
            conditioning.parts["pooled"],
            torch.as_tensor(time, device=noisy.device).expand(len(noisy)),
            return_dict=False,
        )[0]

    def processor_of(self, module: Any) -> type[JointAttention]:
        return SD3Attention


@dataclass(kw_only=True)
class MMDiTModel(JointModel):
    """A latent diffusion model with a multimodal transformer and two CLIP text encoders with projections.

    Without T5, the third text encoder of Stable Diffusion 3, `zeros` tokens stand for its states, as in
    diffusers. A model whose transformer reads no wider states than CLIP's never had T5, and gets none. With
    T5 an instance has a word for it too, whose row learns with CLIP's; maps are read at CLIP's word.
    """

    keys_and_values = re.compile(r"\.attn\.add_[kv]_proj\.(weight|bias)$")
    adapted = (*JointModel.adapted, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    zeros: int = T5_TOKENS
    tokenizer_3: T5Tokenizer | None = None
    text_encoder_3: T5EncoderModel | None = None

    @classmethod
    def options(cls, settings: ModelSettings, index: Config, configs: Configs) -> dict[str, Any]:
        read = configs["transformer"].get("joint_attention_dim", 4096)
        widths = [configs[part].get("hidden_size", 512) for part in ("text_encoder", "text_encoder_2")]
        zeros = {"zeros": T5_TOKENS if read > sum(widths) else 0}
        return super().options(settings, index, configs) | zeros

    @cached_property
    def attentive(self) -> AttentiveTransformer:
        return AttentiveTransformer(self.transformer, self.whole_row)

    @property
    def tokenizers(self) -> list[Any]:
        return super().tokenizers + ([] if self.tokenizer_3 is None else [self.tokenizer_3])

    @property
    def text_encoders(self) -> dict[str, Any]:
        third = {} if self.text_encoder_3 is None else {"text_encoder_3": self.text_encoder_3}
        return super().text_encoders | third

    def encode(self, ids: Tensor) -> Conditioning:
        """CLIP's states of ids (B, E, L) before the last layers side by side, then T5's or zeros; and pooled.

        The states are (B, L + T5's tokens, width).
        """
        found = self.encoded(ids, output_hidden_states=True)
        both, third = found[:2], found[2] if self.tokenizer_3 is not None else None
        states = torch.cat([each.hidden_states[-2] for each in both], -1)
        wider = self.transformer.config.joint_attention_dim - states.shape[-1]
        states = F.pad(states, (0, wider, 0, self.zeros if third is None else 0))
        if third is not None:
            states = torch.cat([states, third.last_hidden_state.to(states.dtype)], 1)
        pooled = torch.cat([each.text_embeds for each in both], -1)
        return Conditioning({"states": states, "pooled": pooled})

    def words(self, prompt: str) -> PromptWords:
        found = changed(super().words(prompt), length=self.tokenizer.model_max_length + self.zeros)
        if self.tokenizer_3 is None:
            return found
        spans, theirs = (
            each(prompt, return_offsets_mapping=True, verbose=False)["offset_mapping"]
            for each in (self.tokenizer, self.tokenizer_3)
        )
        words = []
        for text, places in found.words:
            first, end = spans[places[0]][0], spans[places[-1]][1]
            also = [i for i, (a, b) in enumerate(theirs) if max(a, first) < min(b, end)]
            # the last place of a word is that at which its maps are read
            words.append((text, (*(self.tokenizer.model_max_length + i for i in also), *places)))
        return changed(found, words=tuple(words))
