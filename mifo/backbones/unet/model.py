"""Stable Diffusion 1.x, 2.x and XL: a latent U-Net with cross-attention to the states of CLIP text encoders.

Letters: B samples, E text encoders, L tokens, n pixels of a site.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mifo.acceleration.fused_attention import quick_to_start
from mifo.backbones.clip import prompt_words, tokenize
from mifo.backbones.model import ORIGIN, DiffusionModel, Trainable
from mifo.backbones.tokens import NewTokenRows, add_rows, extend
from mifo.backbones.unet.attention import BoundedAttention, FusedAttention, ReadAttention, bias_of
from mifo.backbones.unet.sites import choose_sites, network_sites
from mifo.backbones.unet.trainable import add_adapters, trainable_parameters
from mifo.errors import MifoError
from mifo.method.backbone import Conditioning, DefaultSites, Read, Rule, Rules, Site
from mifo.method.diffusion.ddim import DDIM
from mifo.method.prompts.instances import PromptWords

# keys of a scheduler's configuration: what weights mean, and at which times pictures are sampled
NOISE = (
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "num_train_timesteps",
    "rescale_betas_zero_snr",
)
SAMPLING = ("timestep_spacing", "steps_offset", "set_alpha_to_one")


class AttentiveUNet:
    """A U-Net whose attention can be read and bounded for one pass; its processors are put back afterwards.

    Attributes:
        unet: a diffusers `UNet2DConditionModel`, or what has its modules and configuration.
        sites: in order of execution. default_sites: see `choose_sites`.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet
        placed = network_sites(unet)
        self.sites = tuple(each.site for each in placed)
        self.default_sites = choose_sites(placed)
        self._modules = [unet.get_submodule(site.name) for site in self.sites]

    def predict(
        self,
        noisy: Tensor,
        time: Tensor,
        conditioning: Conditioning,
        reads: Mapping[Site, Read] | None = None,
        rules: Rules | None = None,
    ) -> tuple[Tensor, dict[Site, Tensor]]:
        """See `Backbone.predict`."""
        kept: dict[Site, Tensor] = {}
        if reads is None and rules is None:  # the network's own attention serves
            return self._forward(noisy, time, conditioning), kept
        with self._installed(self._processors(reads or {}, rules, kept, None)):
            return self._forward(noisy, time, conditioning), kept

    def maps(
        self,
        noisy: Tensor,
        time: Tensor,
        conditioning: Conditioning,
        reads: Mapping[Site, Read],
        rules: Rules | None = None,
    ) -> dict[Site, Tensor]:
        """See `Backbone.maps`."""
        kept: dict[Site, Tensor] = {}
        last = max(reads, key=lambda site: site.index)
        with suppress(_AllRead), self._installed(self._processors(reads, rules, kept, last)):
            self._forward(noisy, time, conditioning)
        return kept

    def enable_checkpointing(self) -> None:
        """Compute activations twice instead of keeping them; both times by the same processors."""

        def twice(module: nn.Module, *inputs: Any) -> Any:
            then = [each.processor for each in self._modules]
            return checkpoint(
                module.__call__,
                *inputs,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), self._installed(then)),
            )

        self.unet.enable_gradient_checkpointing(gradient_checkpointing_func=twice)

    def _forward(self, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        parts = dict(conditioning.parts)
        states = parts.pop("states")
        added = {"added_cond_kwargs": parts} if parts else {}
        return self.unet(
            noisy.to(states.dtype), time, encoder_hidden_states=states, return_dict=False, **added
        )[0]

    def _processors(
        self, reads: Mapping[Site, Read], rules: Rules | None, kept: dict[Site, Tensor], last: Site | None
    ) -> list[object]:
        """A processor for each site; sites of one rule share its bias."""
        biases: dict[tuple[int, torch.dtype], Tensor] = {}

        def bias(rule: Rule, dtype: torch.dtype) -> Tensor:
            name = (id(rule), dtype)
            if name not in biases:
                biases[name] = bias_of(rule, dtype)
            return biases[name]

        def keeper(site: Site) -> Any:
            def keep(read: Tensor) -> None:
                kept[site] = read
                if site == last:
                    raise _AllRead

            return keep

        found: list[object] = []
        for site in self.sites:
            rule = rules.of(site) if rules else None
            if site in reads:
                found.append(ReadAttention(reads[site], keeper(site), rule, bias))
            else:
                found.append(BoundedAttention(rule, bias) if rule else FusedAttention())
        return found

    @contextmanager
    def _installed(self, processors: Sequence[object]) -> Iterator[None]:
        before = [module.processor for module in self._modules]
        try:
            for module, processor in zip(self._modules, processors, strict=True):
                module.processor = processor
            yield
        finally:
            for module, processor in zip(self._modules, before, strict=True):
                module.processor = processor


class _AllRead(Exception):
    """Ends a pass of which nothing further is read."""


@dataclass
class UNetModel(DiffusionModel):
    """The parts of a latent diffusion model with a U-Net, and where they came from.

    The parts have diffusers' names; `tokenizer_2` and `text_encoder_2` are Stable Diffusion XL's. An outline,
    which is a model without weights, has a U-Net on the device "meta", no text encoders and no autoencoder.
    With `zero_empty_prompt` the states of an empty prompt are zeros, as Stable Diffusion XL learned it.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel | None
    vae: AutoencoderKL | None
    unet: UNet2DConditionModel
    noise_scheduler: DDIMScheduler
    name: str
    source: str
    revision: str | None
    fingerprint: str
    vocabulary: str  # a hash of the tokenizers' words without new ones
    tokenizer_2: CLIPTokenizer | None = None
    text_encoder_2: CLIPTextModelWithProjection | None = None
    zero_empty_prompt: bool = False

    def __post_init__(self) -> None:
        if self.text_encoder_2 is not None:
            # by its configuration, the pooled state would be that of the largest id, which a new word has
            self.text_encoder_2.text_model.eos_token_id = self.tokenizer_2.eos_token_id

    @cached_property
    def attentive(self) -> AttentiveUNet:
        return AttentiveUNet(self.unet)

    @property
    def tokenizers(self) -> list[CLIPTokenizer]:
        return [each for each in (self.tokenizer, self.tokenizer_2) if each is not None]

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        named = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {name: each for name, each in named.items() if each is not None}

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, **self.text_encoders}

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.unet.config.sample_size
        return self.unet.config.in_channels, side, side

    @property
    def image_size(self) -> int:
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def process(self) -> DDIM:
        schedule = self._process.get(self.device)
        if schedule is None:
            schedule = self._process[self.device] = DDIM.from_scheduler(self.noise_scheduler, self.device)
        return schedule

    @cached_property
    def _process(self) -> dict[torch.device, DDIM]:
        return {}

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.attentive.sites

    @property
    def default_sites(self) -> DefaultSites:
        return self.attentive.default_sites

    @property
    def denoiser(self) -> nn.Module:
        return self.unet

    @property
    def autoencoder(self) -> nn.Module:
        return self.vae

    def enable_checkpointing(self) -> None:
        self.attentive.enable_checkpointing()
        for encoder in self.text_encoders.values():
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
        self.checkpointing = True

    def to(self, device: torch.device | str) -> Self:
        for part in (*self.networks.values(), self.vae):
            part.to(device)
        return self

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Ids (B, E, L), padded; see `clip.tokenize` for what is refused."""
        return torch.stack([tokenize(each, prompts) for each in self.tokenizers], 1)

    def encode(self, ids: Tensor) -> Conditioning:
        """Hidden states of ids (B, E, L): (B, L, width).

        Stable Diffusion 1.x and 2.x read those after the final norm. XL (arXiv 2307.01952, section 2.1) reads
        those before the last layer of both encoders side by side, the second's pooled state, and sizes: that
        of the original picture, where its crop begins, and that of the picture, as if nothing was cropped.
        """
        ids = ids.to(self.device)
        # activations are computed a second time outside of this block, where they must find the same kernels
        with nullcontext() if self.checkpointing else quick_to_start():
            if self.text_encoder_2 is None:
                return Conditioning({"states": self.text_encoder(ids[:, 0]).last_hidden_state})
            encoders = self.text_encoders.values()
            both = [each(ids[:, i], output_hidden_states=True) for i, each in enumerate(encoders)]
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

    @torch.no_grad()
    def encode_images(self, images: Iterable[Tensor], at_once: int = 8) -> tuple[Tensor, Tensor]:
        """Images are taken `at_once` at a time, so that they need not all be in memory."""
        scale, device = self.vae.config.scaling_factor, self.vae.device
        images, posteriors = iter(images), []
        while part := list(islice(images, at_once)):
            inputs = torch.stack(part).to(device) * 2 - 1
            posteriors.append(self.vae.encode(inputs).latent_dist)
        return (
            torch.cat([posterior.mean for posterior in posteriors]) * scale,
            torch.cat([posterior.std for posterior in posteriors]) * scale,
        )

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, at_once: int = 4) -> Tensor:
        parts = (latents.to(self.vae.dtype) / self.vae.config.scaling_factor).split(at_once)
        images = torch.cat([self.vae.decode(part).sample.float() for part in parts])
        if not images.isfinite().all():
            raise MifoError(
                f"the autoencoder of {self.name} gives pixels that are not finite in {self.vae.dtype}; take "
                "model.dtype=float32 and performance.synthesis_precision=float32"
            )
        return images.div(2).add(0.5).clamp(0, 1)

    def predict(
        self,
        noisy: Tensor,
        time: Tensor,
        conditioning: Conditioning,
        reads: Mapping[Site, Read] | None = None,
        rules: Rules | None = None,
    ) -> tuple[Tensor, dict[Site, Tensor]]:
        return self.attentive.predict(noisy, time, conditioning, reads, rules)

    def maps(
        self,
        noisy: Tensor,
        time: Tensor,
        conditioning: Conditioning,
        reads: Mapping[Site, Read],
        rules: Rules | None = None,
    ) -> dict[Site, Tensor]:
        return self.attentive.maps(noisy, time, conditioning, reads, rules)

    def identity(self) -> dict[str, str | None]:
        return {
            "name": self.name,
            "source": self.source,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "prediction_type": self.noise_scheduler.config.prediction_type,
            "noise": self._scheduler_values(NOISE),
            "vae_scaling_factor": str(self.vae.config.scaling_factor),
            "vocabulary": self.vocabulary,
            "text_rows": ", ".join(str(each.config.vocab_size) for each in self.text_encoders.values()),
        }

    def sampling(self) -> str:
        conditions = {key: value for key, value in self.identity().items() if key not in ORIGIN}
        zeros = ", zero_empty_prompt" * self.zero_empty_prompt
        return f"{conditions} {self._scheduler_values(SAMPLING)}{zeros}"

    def _scheduler_values(self, keys: tuple[str, ...]) -> str:
        return ", ".join(f"{key} {self.noise_scheduler.config[key]}" for key in keys)

    def words(self, prompt: str) -> PromptWords:
        return prompt_words(self.tokenizer, prompt)

    def add_words(
        self, tokens: Sequence[str], initializers: Sequence[str | None] | None = None, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        if self.text_encoder is None:  # an outline, whose tokenizers alone learn the words
            for tokenizer in self.tokenizers:
                extend(tokenizer, tokens)
            return
        initial = initializers or [None] * len(tokens)
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders.values(), strict=True):
            add_rows(tokenizer, encoder, tokens, initial, generator)

    @property
    def new_words(self) -> tuple[str, ...]:
        return next((table.tokens for table in self._tables().values()), ())

    @property
    def new_rows(self) -> dict[str, nn.Parameter]:
        return {name: table.rows for name, table in self._tables().items()}

    def _tables(self) -> dict[str, NewTokenRows]:
        found = {name: each.get_input_embeddings() for name, each in self.text_encoders.items()}
        return {name: each for name, each in found.items() if isinstance(each, NewTokenRows)}

    def places(self, ids: Tensor, word: str) -> Tensor:
        # CLIP's tokenizers cut text alike, so that a word stands at one place for all encoders
        return (ids[0] == self.tokenizer.convert_tokens_to_ids(word)).nonzero()[:, 0]

    def trainable(self, what: Trainable) -> dict[str, dict[str, nn.Parameter]]:
        return trainable_parameters(self.networks, what)

    def add_lora(self, rank: int) -> None:
        add_adapters(self.networks, rank)
