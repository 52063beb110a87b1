"""A whole pipeline of diffusers: the base model with what was learned in it."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from mifo.backbones.tokens import NewTokenRows, extend
from mifo.errors import MifoError


def check_words(kind: str) -> None:
    """Refuse files of words for a pipeline of diffusers that loads none, as Stable Diffusion 3's.

    Raises:
        MifoError: naming what can be exported.
    """
    if not hasattr(getattr(diffusers, kind), "load_textual_inversion"):
        raise MifoError(f"{kind} of diffusers loads no words of textual inversion; take weights=pipeline.")


def absent_parts(kind: str, parts: Iterable[str]) -> list[str]:
    """The text encoders and tokenizers of a pipeline that it goes without, which its loading must be told."""
    taken = inspect.signature(getattr(diffusers, kind).__init__).parameters
    return [name for name in taken if name.startswith(("text_encoder", "tokenizer")) and name not in parts]


@torch.no_grad()
def save_pipeline(
    folder: Path, kind: str, networks: Mapping[str, Any], parts: Mapping[str, Any], words: Sequence[str]
) -> None:
    """Write the folder of a pipeline, in the precision of the networks.

    Args:
        kind: the class of diffusers.
        networks: with new words, whose tables of words are made one here; adapters must be merged.
        parts: of the pipeline by its names; tokenizers without the new words.
        words: what the new words are called there.
    """
    for name, encoder in networks.items():
        if not name.startswith("text_encoder"):
            continue
        tokenizer = parts[name.replace("text_encoder", "tokenizer")]
        extend(tokenizer, words)
        # a pooled state is read at the end of the text, where old configurations read it at the largest id
        encoder.config.eos_token_id = tokenizer.eos_token_id
        table = encoder.get_input_embeddings()
        if isinstance(table, NewTokenRows):
            known, end = table.table.weight, table.first_id + len(table.rows)
            # a table may have rows that its tokenizer does not use: the new words take these
            weights = torch.cat([known[: table.first_id], table.rows.to(known.dtype), known[end:]])
            encoder.set_input_embeddings(nn.Embedding.from_pretrained(weights))
            encoder.config.vocab_size = len(weights)
    made = getattr(diffusers, kind)
    given = {"requires_safety_checker": False, "add_watermarker": False, **parts}
    taken = inspect.signature(made.__init__).parameters
    made(**{name: given.get(name) for name in taken if name != "self"}).save_pretrained(folder)
