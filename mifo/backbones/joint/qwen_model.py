"""A transformer of joint attention that reads prompts by Qwen3, a language model."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mifo.backbones.configs import Config, Configs
from mifo.backbones.joint.model import JointModel
from mifo.backbones.qwen import prompt_words, tokenize
from mifo.backbones.schedulers import flow_of
from mifo.backbones.settings import ModelSettings
from mifo.errors import MifoError
from mifo.method.diffusion.flow import Flow
from mifo.method.prompts.instances import PromptWords


@dataclass(kw_only=True)
class QwenModel(JointModel):
    """The language model's new rows learn, by gradients through all of its layers; nothing else of it does.

    Class attributes:
        thinking: see `qwen.message`. patch: side of what the transformer attends by, in the autoencoder's
            pixels. multiple: the patches' rows and columns are a multiple of it.

    Attributes:
        side: of pictures, in pixels; the transformer itself takes any. patches: that attend in a row.
    """

    sampled: ClassVar[tuple[str, ...]] = (*JointModel.sampled, "use_dynamic_shifting")
    thinking: ClassVar[bool]
    patch: ClassVar[int] = 2
    multiple: ClassVar[int] = 1

    side: int
    patches: int

    @classmethod
    def options(cls, settings: ModelSettings, index: Config, configs: Configs) -> dict[str, Any]:
        side = settings.side or configs["vae"]["sample_size"]
        patch = 2 ** (len(configs["vae"]["block_out_channels"]) - 1) * cls.patch
        if side < 1 or side % (patch * cls.multiple):
            raise MifoError(
                f"pictures of {side} pixels do not fit model.source={settings.source}; set model.side to a "
                f"multiple of {patch * cls.multiple}."
            )
        return super().options(settings, index, configs) | {"side": side, "patches": side // patch}

    @abstractmethod
    def shift_level(self, steps: int) -> float:
        """The logarithm of the shift of a scheduler that has none of its own."""

    @cached_property
    def process(self) -> Flow:
        return flow_of(self.noise_scheduler, self.timesteps, even=True, level=self.shift_level)

    @property
    def image_size(self) -> int:
        return self.side

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Ids (B, 1, `TOKENS`) of the prompts' messages, −1 as padding."""
        return tokenize(self.tokenizer, prompts, self.thinking)[:, None]

    def words(self, prompt: str) -> PromptWords:
        return prompt_words(self.tokenizer, prompt, self.thinking)

    def hidden(self, ids: Tensor) -> tuple[Tensor, ...]:
        """The states (B, L, width) of ids (B, L) before and after each layer of the language model."""
        ids = ids.to(self.device)
        there = ids >= 0
        # a token sees those before it; made here, since transformers would wait for the device to make it
        before = torch.ones(2 * ids.shape[1:], dtype=torch.bool, device=ids.device).tril()
        found = self.text_encoder.base_model(  # without the head that would name the next token
            input_ids=ids.masked_fill(~there, self.tokenizer.pad_token_id),
            attention_mask=before & there[:, None, None],
            output_hidden_states=True,
            use_cache=False,
        )
        states: tuple[Tensor, ...] = found.hidden_states
        return states
