"""Qwen's tokenizers: a prompt as a message of a chat, its ids, and its words."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mifo.errors import MifoError
from mifo.method.prompts.instances import PromptWords

TOKENS = 512  # of a message with its template, as diffusers' pipelines have it
_PLACE = "\ufffc"  # stands for the prompt where its place is looked for


def message(tokenizer: Any, prompt: str, thinking: bool) -> str:
    """A prompt within the tokenizer's chat template, up to where the model would answer.

    Args:
        thinking: whether the answer may begin with thoughts, which changes the template's end.
    """
    told = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(
        told, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return text


def tokenize(tokenizer: Any, prompts: Sequence[str], thinking: bool) -> Tensor:
    """Token ids (B, `TOKENS`) of the prompts' messages, −1 as padding.

    Raises:
        MifoError: a message has more tokens than fit.
    """
    texts = [message(tokenizer, prompt, thinking) for prompt in prompts]
    found = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=False)
    for prompt, row in zip(prompts, found.input_ids, strict=True):
        _check_length(prompt, row)
    return torch.tensor(found.input_ids).masked_fill(torch.tensor(found.attention_mask) == 0, -1)


def prompt_words(
    tokenizer: Any, prompt: str, thinking: bool, length: Callable[[int], int] = lambda used: TOKENS
) -> PromptWords:
    """The words of a prompt, in small letters, and where their tokens stand in its padded message.

    A word is a new word, a run of letters and digits, or another sign; a token is its last letter's word's.

    Args:
        length: of the sequence that the network reads, by the number of the message's tokens.

    Raises:
        MifoError: the message has more tokens than fit.
    """
    text = message(tokenizer, prompt, thinking)
    start = message(tokenizer, _PLACE, thinking).index(_PLACE)
    found = tokenizer(text, padding="max_length", max_length=TOKENS, return_offsets_mapping=True)
    _check_length(prompt, found.input_ids)
    new = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    pattern = "|".join([*map(re.escape, new), r"\w+", r"[^\w\s]"])
    words = [(word[0].lower(), word.span()) for word in re.finditer(pattern, prompt)]
    places: list[list[int]] = [[] for _ in words]
    end = None
    for position, (first, last) in enumerate(found.offset_mapping):
        if end is None and first >= start + len(prompt) and last > first:
            end = position
        for own, (_, (begin, stop)) in zip(places, words, strict=True):
            if begin < last - start <= stop:
                own.append(position)
    assert end is not None  # a template closes the message
    told = tuple((word, tuple(own)) for (word, _), own in zip(words, places, strict=True) if own)
    return PromptWords(told, end, length(sum(found.attention_mask)))


def _check_length(prompt: str, ids: Sequence[int]) -> None:
    if len(ids) > TOKENS:
        raise MifoError(
            f"the prompt {prompt!r} has {len(ids)} tokens with its template, {TOKENS} fit the model; "
            "shorten it."
        )
