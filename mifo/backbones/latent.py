"""What models of diffusers' parts share: text encoders, of CLIP unless a family says otherwise, and the rest.

Letters: B samples, E text encoders, L tokens.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from re import Pattern
from typing import Any, ClassVar, Self

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection

from mifo.acceleration.fused_attention import quick_to_start
from mifo.backbones.attention import AttentiveNetwork, draws_in_training
from mifo.backbones.clip import prompt_words, tokenize
from mifo.backbones.configs import Config, Configs
from mifo.backbones.model import ORIGIN, DiffusionModel, Trainable
from mifo.backbones.self_check import check_maps, check_rules
from mifo.backbones.settings import ModelSettings
from mifo.backbones.tokens import NewTokenRows, add_rows, extend
from mifo.backbones.trainable import add_adapters, trainable_parameters
from mifo.errors import MifoError
from mifo.method.backbone import Conditioning, DefaultSites, Rules, Site
from mifo.method.prompts.instances import PromptWords


@dataclass(kw_only=True)
class LatentModel(DiffusionModel):
    """The parts of a latent diffusion model, and where they came from.

    The parts have diffusers' names; a subclass adds the denoising network. An outline, which is a model
    without weights, has that network on the device "meta", no text encoders and no autoencoder.

    Class attributes:
        part: name of the denoising network. keys_and_values, adapted: see `trainable.py`.
        noise, sampled: keys of a scheduler's configuration: what weights mean, and at which times pictures
            are sampled.
    """

    part: ClassVar[str]
    keys_and_values: ClassVar[Pattern[str]]
    adapted: ClassVar[tuple[str, ...] | str] = ("to_q", "to_k", "to_v", "to_out.0")
    noise: ClassVar[tuple[str, ...]] = ()
    sampled: ClassVar[tuple[str, ...]] = ()

    tokenizer: Any  # of transformers, as the text encoders
    text_encoder: Any
    vae: Any  # an autoencoder of diffusers; None in an outline, as the text encoders
    noise_scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler
    name: str
    source: str
    revision: str | None
    fingerprint: str
    vocabulary: str  # a hash of the tokenizers' words without new ones
    tokenizer_2: Any = None
    text_encoder_2: Any = None

    def __post_init__(self) -> None:
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders.values(), strict=False):
            if isinstance(encoder, CLIPTextModelWithProjection):
                # by its configuration, the pooled state would be that of the largest id, which a new word has
                encoder.text_model.eos_token_id = tokenizer.eos_token_id

    @classmethod
    @abstractmethod
    def options(cls, settings: ModelSettings, index: Config, configs: Configs) -> dict[str, Any]:
        """Fields of the family's own, by settings, model_index.json and the configurations of the networks.

        Raises:
            MifoError: a value of the settings that is not known.
        """

    @cached_property
    @abstractmethod
    def attentive(self) -> AttentiveNetwork: ...

    @property
    def tokenizers(self) -> list[Any]:
        return [each for each in (self.tokenizer, self.tokenizer_2) if each is not None]

    @property
    def text_encoders(self) -> dict[str, Any]:
        named = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {name: each for name, each in named.items() if each is not None}

    @property
    def denoiser(self) -> Any:
        return getattr(self, self.part)

    @property
    def autoencoder(self) -> Any:
        return self.vae

    @property
    def networks(self) -> dict[str, Any]:
        return {self.part: self.denoiser, **self.text_encoders}

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.denoiser.config.sample_size
        return self.denoiser.config.in_channels, side, side

    @property
    def image_size(self) -> int:
        return self.denoiser.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.attentive.sites

    @property
    def default_sites(self) -> DefaultSites:
        return self.attentive.default_sites

    def enable_checkpointing(self) -> None:
        self.attentive.enable_checkpointing()
        for encoder in self.text_encoders.values():
            draws = draws_in_training(encoder)
            encoder.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": draws})
        self.checkpointing = True

    def to(self, device: torch.device | str) -> Self:
        for part in (*self.networks.values(), self.vae):
            part.to(device)
        return self

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Ids (B, E, L), padded, of shorter encoders with −1; see `clip.tokenize` for what is refused."""
        found = [tokenize(each, prompts) for each in self.tokenizers]
        longest = max(each.shape[1] for each in found)
        return torch.stack([F.pad(each, (0, longest - each.shape[1]), value=-1) for each in found], 1)

    def encoded(self, ids: Tensor, **options: Any) -> list[Any]:
        """What each text encoder gives for its ids of (B, E, L)."""
        ids = ids.to(self.device)
        # activations are computed a second time outside of this block, where they must find the same kernels
        with nullcontext() if self.checkpointing else quick_to_start():
            return [
                encoder(ids[:, i, : tokenizer.model_max_length], **options)
                for i, (tokenizer, encoder) in enumerate(
                    zip(self.tokenizers, self.text_encoders.values(), strict=True)
                )
            ]

    @property
    def level(self) -> tuple[Any, Any]:
        """Scale and shift: latents are (z − shift) · scale of what the autoencoder gives, `packed`."""
        return self.vae.config.scaling_factor, self.vae.config.shift_factor or 0

    def packed(self, codes: Tensor) -> Tensor:
        """What the autoencoder gives as the network reads it, (B, C, h, w)."""
        return codes

    def unpacked(self, latents: Tensor) -> Tensor:
        """`packed` undone."""
        return latents

    @torch.no_grad()
    def encode_images(self, images: Iterable[Tensor], at_once: int = 8) -> tuple[Tensor, Tensor]:
        """Images are taken `at_once` at a time, so that they need not all be in memory."""
        scale, shift = self.level
        device, images, posteriors = self.vae.device, iter(images), []
        while part := list(islice(images, at_once)):
            inputs = torch.stack(part).to(device) * 2 - 1
            posteriors.append(self.vae.encode(inputs).latent_dist)
        return (
            (self.packed(torch.cat([posterior.mean for posterior in posteriors])) - shift) * scale,
            self.packed(torch.cat([posterior.std for posterior in posteriors])) * scale,
        )

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, at_once: int = 4) -> Tensor:
        scale, shift = self.level
        parts = self.unpacked(latents.to(self.vae.dtype) / scale + shift).split(at_once)
        images = torch.cat([self.vae.decode(part).sample.float() for part in parts])
        if not images.isfinite().all():
            raise MifoError(
                f"the autoencoder of {self.name} gives pixels that are not finite in {self.vae.dtype}; take "
                "model.dtype=float32 and performance.synthesis_precision=float32"
            )
        return images.div(2).add(0.5).clamp(0, 1)

    def predict(self, *inputs: Any, **options: Any) -> tuple[Tensor, dict[Site, Tensor]]:
        return self.attentive.predict(*inputs, **options)

    def maps(self, *inputs: Any, **options: Any) -> dict[Site, Tensor]:
        return self.attentive.maps(*inputs, **options)

    def identity(self) -> dict[str, str | None]:
        return {
            "name": self.name,
            "source": self.source,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "prediction_type": self.prediction_type,
            "noise": self._scheduler_values(self.noise),
            "vae_scaling_factor": str(self.vae.config.get("scaling_factor")),
            "vocabulary": self.vocabulary,
            "text_rows": ", ".join(str(each.config.vocab_size) for each in self.text_encoders.values()),
        }

    def sampling(self) -> str:
        conditions = {key: value for key, value in self.identity().items() if key not in ORIGIN}
        return f"{conditions} {self._scheduler_values(self.sampled)}"

    @property
    @abstractmethod
    def prediction_type(self) -> str:
        """What the network predicts."""

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
        return trainable_parameters(self.part, self.networks, what, self.keys_and_values)

    def check_attention(
        self, noisy: Tensor, time: Tensor, conditioning: Conditioning, reads: Sequence[Site], rules: Rules
    ) -> None:
        check_maps(self.attentive, noisy, time, conditioning, reads)
        check_rules(self.attentive, noisy, time, conditioning, rules)

    def add_lora(self, rank: int) -> None:
        add_adapters(self.part, self.networks, rank, self.adapted)
