"""CLIP's tokenizer of the miniature's words: byte-level BPE in which each word is one token."""

import json
from itertools import pairwise
from pathlib import Path

from open_clip.tokenizer import bytes_to_unicode
from transformers import CLIPTokenizer

from mifo.backbones.clip import END_OF_WORD
from mifo.world.vocabulary import words

MAX_LENGTH = 32  # tokens of a prompt, start and end included


def _merge(symbols: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """Apply BPE merges to ``symbols``, the earliest learned first."""
    while True:
        pairs = [pair for pair in pairwise(symbols) if pair in merges]
        if not pairs:
            return symbols
        best = min(pairs, key=merges.__getitem__)
        out, position = [], 0
        while position < len(symbols):
            if tuple(symbols[position : position + 2]) == best:
                out.append("".join(best))
                position += 2
            else:
                out.append(symbols[position])
                position += 1
        symbols = out


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write ``vocab.json`` and ``merges.txt`` into ``folder`` and load them as a CLIPTokenizer.

    Words are learned one after another: what earlier merges leave of a word is merged from left to right. A
    later merge ranks lower than all earlier ones, so it can never take apart a word already learned.
    """
    merges: dict[tuple[str, str], int] = {}
    for word in words():
        symbols = _merge([*word[:-1], word[-1] + END_OF_WORD], merges)
        while len(symbols) > 1:
            merges[(symbols[0], symbols[1])] = len(merges)
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
    symbols = list(bytes_to_unicode().values())
    entries = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *(a + b for a, b in merges)]
    entries = list(dict.fromkeys([*entries, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocab_file.write_text(
        json.dumps({entry: index for index, entry in enumerate(entries)}, ensure_ascii=False)
    )
    merges_file.write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n")
    tokenizer = CLIPTokenizer(
        str(vocab_file), str(merges_file), pad_token="<|endoftext|>", model_max_length=MAX_LENGTH
    )
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)
