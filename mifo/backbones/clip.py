"""CLIP's tokenizers: prompts to ids, and the words of a prompt."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from mifo.errors import MifoError
from mifo.method.prompts.instances import PromptWords

END_OF_WORD = "</w>"


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids (B, L) of the prompts, padded to the tokenizer's length L.

    Raises:
        MifoError: a prompt has more tokens than fit; cutting it would lose words without telling.
    """
    length = tokenizer.model_max_length
    ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=False).input_ids
    for prompt, row in zip(prompts, ids, strict=True):
        _check_length(prompt, row, length)
    return torch.tensor(ids)


def prompt_words(tokenizer: CLIPTokenizer, prompt: str) -> PromptWords:
    """The words of a prompt and their positions: byte-pair pieces up to a word's end, or an added token.

    Raises:
        MifoError: the prompt is too long for the tokenizer.
    """
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    _check_length(prompt, ids, tokenizer.model_max_length)
    added, special = tokenizer.get_added_vocab(), set(tokenizer.all_special_ids)
    words: list[tuple[str, list[int]]] = []
    open_word = False
    for position, piece in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        if ids[position] in special:
            open_word = False
            continue
        if not open_word:
            words.append(("", []))
        text, positions = words[-1]
        words[-1] = (text + piece.removesuffix(END_OF_WORD), [*positions, position])
        open_word = piece not in added and not piece.endswith(END_OF_WORD)
    end = ids.index(tokenizer.eos_token_id, 1)
    return PromptWords(
        tuple((text, tuple(places)) for text, places in words), end, tokenizer.model_max_length
    )


def _check_length(prompt: str, ids: Sequence[int], length: int) -> None:
    if len(ids) > length:
        raise MifoError(f"the prompt {prompt!r} has {len(ids)} tokens, {length} fit the model; shorten it.")
