"""FLUX.2 [klein], as diffusers' `Flux2KleinPipeline` has it.

Letters: B samples, L tokens, C × h × w latents: patches of two by two codes of the autoencoder, normed.
"""

import re
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mifo.backbones.configs import Config, Configs
from mifo.backbones.flux2.attention import DoubleAttention, SingleAttention
from mifo.backbones.joint.attention import JointAttention
from mifo.backbones.joint.network import JointNetwork
from mifo.backbones.joint.qwen_model import QwenModel
from mifo.backbones.joint.sites import JOINT, joint_sites
from mifo.backbones.settings import ModelSettings
from mifo.method.backbone import Conditioning

READ = (9, 18, 27)  # layers of the language model, whose states after them stand side by side


class Flux2Network(JointNetwork):
    """A `Flux2Transformer2DModel` on a square of patches; `guidance` goes into models that embed it."""

    words_first = True

    def __init__(self, transformer: Any, side: int, whole_row: bool, guidance: float | None) -> None:
        blocks = {"transformer_blocks": transformer.transformer_blocks}
        blocks["single_transformer_blocks"] = transformer.single_transformer_blocks
        names = [f"{kind}.{number}.attn" for kind, own in blocks.items() for number in range(len(own))]
        super().__init__(transformer, joint_sites([(name, JOINT) for name in names], side), whole_row)
        self.side, self.guidance = side, guidance

    def processor_of(self, module: Any) -> type[JointAttention]:
        return SingleAttention if hasattr(module, "to_qkv_mlp_proj") else DoubleAttention

    def forward(self, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        states = conditioning.parts["states"]
        place = partial(torch.arange, device=noisy.device)
        here, rows = place(1), place(self.side)
        guidance = None if self.guidance is None else noisy.new_full((len(noisy),), self.guidance)
        predicted = self.network(
            noisy.to(states.dtype).flatten(2).mT,  # (B, n, C)
            states,
            torch.as_tensor(time, device=noisy.device).expand(len(noisy)) / 1000,
            img_ids=torch.cartesian_prod(here, rows, rows, here),
            txt_ids=torch.cartesian_prod(here, here, here, place(states.shape[1])),
            guidance=guidance,
            return_dict=False,
        )[0]
        return predicted.mT.unflatten(2, (self.side, self.side))


@dataclass(kw_only=True)
class Flux2Model(QwenModel):
    """`distilled`: few steps without guidance. `guidance`: what a model reads that embeds its strength."""

    keys_and_values = re.compile(r"\.attn\.add_[kv]_proj\.weight$")
    adapted = (
        r".*\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)"
        r"|single_transformer_blocks\.\d+\.attn\.to_out"
    )
    thinking = False

    distilled: bool = False
    guidance: float | None = None

    @classmethod
    def options(cls, settings: ModelSettings, index: Config, configs: Configs) -> dict[str, Any]:
        embeds = configs["transformer"].get("guidance_embeds", True)
        return super().options(settings, index, configs) | {
            "distilled": bool(index.get("is_distilled")),
            "guidance": settings.guidance if embeds else None,
        }

    @cached_property
    def attentive(self) -> Flux2Network:
        return Flux2Network(self.transformer, self.patches, self.whole_row, self.guidance)

    def shift_level(self, steps: int) -> float:
        """Falls with the steps of small pictures, as FLUX.2's makers fit it."""
        patches = self.patches**2
        many = 0.00016927 * patches + 0.45666666  # 200 steps
        if patches > 4300:
            return many
        few = 8.73809524e-05 * patches + 1.89833333  # 10 steps
        return many + (many - few) / 190 * (steps - 200)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.transformer.config.in_channels, self.patches, self.patches

    @property
    def level(self) -> tuple[Any, Any]:
        norm = self.vae.bn
        deviation = (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        return 1 / deviation[:, None, None], norm.running_mean[:, None, None]

    def packed(self, codes: Tensor) -> Tensor:
        return F.pixel_unshuffle(codes, self.patch)

    def unpacked(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, self.patch)

    def encode(self, ids: Tensor) -> Conditioning:
        """States (B, L, 3 · width) of ids (B, 1, L), those of padding too, which the transformer reads."""
        found = self.hidden(ids[:, 0])
        return Conditioning({"states": torch.cat([found[layer] for layer in READ], -1)})

    def identity(self) -> dict[str, str | None]:
        return super().identity() | {"vae_batch_norm_eps": str(self.vae.config.batch_norm_eps)}

    def sampling(self) -> str:
        return f"{super().sampling()}, guidance {self.guidance}"
