"""Prompts to token ids to what the U-Net's cross-attention reads."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from mifo.attention.processors import quick_to_start
from mifo.errors import MifoError
from mifo.models.loading import DiffusionModel


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids (B, L) of the prompts, padded to the tokenizer's length L.

    Raises:
        MifoError: a prompt has more tokens than fit; cutting it would lose words without telling.
    """
    length = tokenizer.model_max_length
    ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=False).input_ids
    for prompt, row in zip(prompts, ids, strict=True):
        if len(row) > length:
            raise MifoError(
                f"the prompt {prompt!r} has {len(row)} tokens, {length} fit the text encoder; shorten it."
            )
    return torch.tensor(ids)


def encode_ids(
    model: DiffusionModel, ids: Tensor, text_encoder: Callable[[Tensor], Any] | None = None
) -> Tensor:
    """Hidden states (B, L, width) of token ids (B, L) after the final norm, as Stable Diffusion has it.

    Args:
        text_encoder: the model's own or what wraps it; None: the model's own.
    """
    # activations are computed a second time outside of this block, where they must find the same kernels
    twice = any(getattr(part, "gradient_checkpointing", False) for part in model.text_encoder.modules())
    with nullcontext() if twice else quick_to_start():
        return (text_encoder or model.text_encoder)(ids.to(model.device)).last_hidden_state


@torch.no_grad()
def encode_prompts(model: DiffusionModel, prompts: Sequence[str]) -> Tensor:
    """Hidden states (B, L, width) of prompts, for sampling; see `tokenize` for what is refused."""
    return encode_ids(model, tokenize(model.tokenizer, prompts))
