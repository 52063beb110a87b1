"""Prompts that name instances, and where their tokens stand."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mifo.errors import MifoError
from mifo.prompts.function_words import is_function_word

INSTANCE = re.compile(r"<asset\d+>")
END_OF_WORD = "</w>"

# what people write for an instance: asset0, <ASSET0>, <asset 0>, [asset0]
_MEANT = re.compile(r"[<\[]?\s*\basset[\s_-]*(\d+)\b\s*[>\]]?", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\{[^{}]*\}?")


@dataclass(frozen=True)
class PromptTokens:
    """Token positions in a prompt, counted from the start-of-text token at 0.

    Attributes:
        subjects: positions of each key's tokens, in the order of the keys. The last is the leading token:
            that of the last word, which in an English noun phrase is its noun.
        filter_indices: positions of function words outside all subjects.
        eos_index: position of the first end-of-text token.
    """

    subjects: dict[str, tuple[int, ...]]
    filter_indices: tuple[int, ...]
    eos_index: int


def check_placeholders(key: str, text: str, known: Collection[str] = ()) -> None:
    """Refuse a placeholder that nothing is put in for.

    Args:
        key: the setting that holds `text`.
        known: names of placeholders, without braces.

    Raises:
        MifoError: naming the placeholder and those that are known.
    """
    for found in _PLACEHOLDER.findall(text):
        if found[1:-1] not in known or not found.endswith("}"):
            takes = " or ".join(f"{{{name}}}" for name in known)
            fix = f"take {takes}" if known else "take it out"
            raise MifoError(f"{key}={text!r} holds {found}, for which nothing is put in there; {fix}.")


def check_instances(prompt: str, keys: Iterable[str], known: Collection[str]) -> None:
    """Refuse what can be refused without a tokenizer.

    Args:
        keys: names of the layout's boxes: instance tokens, or words that occur in the prompt.
        known: the learned instance tokens.

    Raises:
        MifoError: the prompt or a box names an instance that was not learned, or writes one otherwise than
            <asset0>, or a box names one that the prompt lacks.
    """
    keys = list(keys)
    for text in (prompt, *keys) if known else ():
        for meant in _MEANT.finditer(text):
            if not INSTANCE.fullmatch(meant[0].strip()):
                raise MifoError(
                    f"{text!r} names {meant[0].strip()}, which is no instance; write <asset{meant[1]}>."
                )
    for name in dict.fromkeys(INSTANCE.findall(" ".join([prompt, *keys]))):
        if name not in known:
            has = ", ".join(known) or "no instances"
            raise MifoError(
                f"{name} is not one of the learned instances ({has}): correct the prompt and the boxes."
            )
    for key in keys:
        words = " ".join(key.lower().split())
        if not words or words not in " ".join(prompt.lower().split()):
            raise MifoError(_lacking(prompt, key))


def find_instances(tokenizer: PreTrainedTokenizerBase, prompt: str, keys: Sequence[str] = ()) -> PromptTokens:
    """Find the tokens of instances, of other boxed phrases and of function words.

    Every occurrence of a key counts. Longer keys are found first and keep their tokens, so that "red car" and
    "car" may both have boxes.

    Args:
        tokenizer: a CLIP tokenizer that knows the learned instance tokens.
        keys: instance tokens such as "<asset0>", or whole words that follow each other in the prompt ("red
            car").

    Raises:
        MifoError: the prompt is too long for the tokenizer; it or a key names an instance that the tokenizer
            does not know; or a key is not in the prompt.
    """
    added = tokenizer.get_added_vocab()
    check_instances(prompt, keys, [token for token in added if INSTANCE.fullmatch(token)])
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if len(ids) > tokenizer.model_max_length:
        raise MifoError(
            f"The prompt {prompt!r} has {len(ids)} tokens, but the model reads {tokenizer.model_max_length}: "
            "shorten it."
        )
    words = _words(tokenizer, ids)
    free = [True] * len(words)
    found: dict[str, tuple[int, ...]] = {}
    for key in sorted(keys, key=lambda key: -len(key.split())):
        wanted = [text for text, _ in _words(tokenizer, tokenizer(key)["input_ids"])]
        positions: list[int] = []
        for start in range(len(words) - len(wanted) + 1):
            span = range(start, start + len(wanted))
            if [words[word][0] for word in span] == wanted and all(free[word] for word in span):
                for word in span:
                    free[word] = False
                    positions += words[word][1]
        if not positions:
            raise MifoError(_lacking(prompt, key))
        found[key] = tuple(positions)
    filtered = [
        position
        for (text, positions), unclaimed in zip(words, free, strict=True)
        if unclaimed and is_function_word(text)
        for position in positions
    ]
    return PromptTokens(
        {key: found[key] for key in keys}, tuple(filtered), ids.index(tokenizer.eos_token_id, 1)
    )


def _words(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Words of tokenised text and their positions: byte-pair pieces up to a word's end, or an added token."""
    added = tokenizer.get_added_vocab()
    special = set(tokenizer.all_special_ids)
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
    return words


def _lacking(prompt: str, key: str) -> str:
    return f"The layout has a box for {key!r}, but the prompt {prompt!r} lacks it: name it in the prompt."
