"""Stable Diffusion 1.x, 2.x and XL: a latent U-Net with cross-attention to the states of CLIP text encoders.

Letters: B samples, E text encoders, L tokens, n pixels of a site.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from mifo.backbones.attention import AttentiveNetwork, Biases, Keep
from mifo.backbones.configs import Config, Configs
from mifo.backbones.latent import LatentModel
from mifo.backbones.schedulers import ddim_of
from mifo.backbones.settings import ModelSettings
from mifo.backbones.unet.attention import BoundedAttention, FusedAttention, ReadAttention
from mifo.backbones.unet.sites import choose_sites, network_sites
from mifo.method.backbone import Conditioning, Read, Rules, Site
from mifo.method.diffusion.ddim import DDIM


class AttentiveUNet(AttentiveNetwork):
    """A U-Net whose attention can be read and bounded; see `choose_sites` for what is read by default."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        placed = network_sites(unet)
        super().__init__(unet, [each.site for each in placed], choose_sites(placed))

    def forward(self, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        parts = dict(conditioning.parts)
        states = parts.pop("states")
        added = {"added_cond_kwargs": parts} if parts else {}
        return self.network(
            noisy.to(states.dtype), time, encoder_hidden_states=states, return_dict=False, **added
        )[0]

    def processors(self, reads: Mapping[Site, Read], keep: Keep, rules: Rules | None) -> list[Any]:
        biases = Biases()
        found: list[Any] = []
        for (site,) in self.layers:
            rule = rules.of(site) if rules else None
            if site in reads:
                found.append(ReadAttention(site, reads[site], keep, rule, biases))
            else:
                found.append(BoundedAttention(rule, biases) if rule else FusedAttention())
        return found


@dataclass(kw_only=True)
class UNetModel(LatentModel):
    """A latent diffusion model with a U-Net.

    `tokenizer_2` and `text_encoder_2` are Stable Diffusion XL's. With `zero_empty_prompt` the states of an
    empty prompt are zeros, as Stable Diffusion XL learned it.
    """

    part = "unet"
    keys_and_values = re.compile(r"\.attn2\.to_[kv]\.weight$")
    noise = tuple(
        "beta_schedule beta_start beta_end trained_betas num_train_timesteps rescale_betas_zero_snr".split()
    )
    sampled = ("timestep_spacing", "steps_offset", "set_alpha_to_one")

    unet: UNet2DConditionModel
    zero_empty_prompt: bool = False

    @classmethod
    def options(cls, settings: ModelSettings, index: Config, configs: Configs) -> dict[str, Any]:
        return {"zero_empty_prompt": bool(index["force_zeros_for_empty_prompt"])}

    @cached_property
    def attentive(self) -> AttentiveUNet:
        return AttentiveUNet(self.unet)

    @property
    def process(self) -> DDIM:  # type: ignore[override]  # whose times are whole numbers
        schedule = self._process.get(self.device)
        if schedule is None:
            schedule = self._process[self.device] = ddim_of(self.noise_scheduler, self.device)
        return schedule

    @property
    def prediction_type(self) -> str:
        return self.process.prediction_type

    @cached_property
    def _process(self) -> dict[torch.device, DDIM]:
        return {}

    def encode(self, ids: Tensor) -> Conditioning:
        """Hidden states of ids (B, E, L): (B, L, width).

        Stable Diffusion 1.x and 2.x read those after the final norm. XL (arXiv 2307.01952, section 2.1) reads
        those before the last layer of both encoders side by side, the second's pooled state, and sizes: that
        of the original picture, where its crop begins, and that of the picture, as if nothing was cropped.
        """
        if self.text_encoder_2 is None:
            return Conditioning({"states": self.encoded(ids)[0].last_hidden_state})
        both = self.encoded(ids, output_hidden_states=True)
        sizes = torch.full((len(ids), 6), self.image_size, device=self.device)
        sizes[:, 2:4] = 0
        states = torch.cat([each.hidden_states[-2] for each in both], -1)
        return Conditioning({"states": states, "text_embeds": both[1].text_embeds, "time_ids": sizes})

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        found = super().encode_prompts(prompts)
        if self.zero_empty_prompt:
            empty = torch.tensor([not prompt for prompt in prompts], device=self.device)
            for name in found.parts.keys() - {"time_ids"}:
                found.parts[name][empty] = 0
        return found

    def sampling(self) -> str:
        return super().sampling() + ", zero_empty_prompt" * self.zero_empty_prompt
