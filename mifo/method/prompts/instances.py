"""Prompts that name instances, and where their tokens stand."""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from mifo.errors import MifoError
from mifo.method.prompts.function_words import is_function_word

INSTANCE = re.compile(r"<asset\d+>")


def instance_tokens(count: int) -> list[str]:
    """The names of so many instances in prompts: <asset0>, <asset1>, …"""
    return [f"<asset{i}>" for i in range(count)]


@dataclass(frozen=True)
class PromptWords:
    """The words of a prompt as a model reads them."""

    words: tuple[tuple[str, tuple[int, ...]], ...]  # text and positions in the conditioning sequence
    end: int  # position of the first end-of-text token
    length: int  # of the conditioning sequence


# what people write for an instance: asset0, <ASSET0>, <asset 0>, [asset0]
_MEANT = re.compile(r"[<\[]?\s*\basset[\s_-]*(\d+)\b\s*[>\]]?", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\{[^{}]*\}?")


@dataclass(frozen=True)
class PromptTokens:
    """Token positions in a prompt, counted from the start-of-text token at 0.

    The last token of a subject is its leading one: that of its last word, in an English noun phrase the noun.
    """

    subjects: dict[str, tuple[int, ...]]  # positions of each key's tokens, in the order of the keys
    filter_indices: tuple[int, ...]  # function words outside all subjects
    eos_index: int  # the first end-of-text token
    length: int  # of the conditioning sequence


def check_placeholders(key: str, text: str, known: Collection[str] = ()) -> None:
    """Refuse a placeholder that nothing is put in for.

    Args:
        key: the setting that holds `text`.
        known: names of placeholders, without braces.
    """
    for found in _PLACEHOLDER.findall(text):
        if found[1:-1] not in known or not found.endswith("}"):
            takes = " or ".join(f"{{{name}}}" for name in known)
            fix = f"take {takes}" if known else "take it out"
            raise MifoError(f"{key}={text!r} holds {found}, for which nothing is put in there; {fix}.")


def check_instances(prompt: str, keys: Iterable[str], known: Collection[str]) -> None:
    """Check a prompt and the names of its boxes without a tokenizer.

    Args:
        keys: names of the layout's boxes: instance tokens, or whole words that follow each other in the
            prompt.
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
            raise MifoError(f"{name} is not one of the learned instances ({has}); correct prompt and boxes.")
    for key in keys:
        words = " ".join(key.lower().split())
        pattern = re.escape(words)
        if not INSTANCE.fullmatch(words):  # its brackets part it from letters beside it
            pattern = rf"(?<![^\W\d_]){pattern}(?![^\W\d_])"
        if not words or not re.search(pattern, " ".join(prompt.lower().split())):
            raise MifoError(_lacking(prompt, key))


def find_instances(prompt: str, keys: Sequence[str], words_of: Callable[[str], PromptWords]) -> PromptTokens:
    """Find the tokens of instances, of other boxed phrases and of function words.

    Every occurrence of a key counts. Longer keys are found first and keep their tokens, so that "red car" and
    "car" may both have boxes.

    Args:
        keys: instance tokens such as "<asset0>", or whole words that follow each other in the prompt ("red
            car").
        words_of: the words of a text as the model reads them.

    Raises:
        MifoError: the prompt is too long for the model, or a key is not in the prompt.
    """
    words = words_of(prompt)
    texts = [text for text, _ in words.words]
    free = [True] * len(texts)
    found: dict[str, tuple[int, ...]] = {}
    for key in sorted(keys, key=lambda key: -len(key.split())):
        wanted = [text for text, _ in words_of(key).words]
        positions: list[int] = []
        for start in range(len(texts) - len(wanted) + 1):
            span = range(start, start + len(wanted))
            if texts[start : start + len(wanted)] == wanted and all(free[word] for word in span):
                for word in span:
                    free[word] = False
                    positions += words.words[word][1]
        if not positions:
            raise MifoError(_lacking(prompt, key))
        found[key] = tuple(positions)
    filtered = [
        position
        for (text, positions), unclaimed in zip(words.words, free, strict=True)
        if unclaimed and is_function_word(text)
        for position in positions
    ]
    return PromptTokens({key: found[key] for key in keys}, tuple(filtered), words.end, words.length)


def _lacking(prompt: str, key: str) -> str:
    return f"The layout has a box for {key!r}, but the prompt {prompt!r} lacks it: name it in the prompt."
