"""The one exception that a user of MIFO is meant to read, and what its sentences have in common."""

import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NoReturn


class MifoError(Exception):
    """A refusal in one sentence that names what is wrong and how to put it right.

    The command line prints it without a traceback and exits with code 2.
    """


def check_least(place: str, settings: Any, **least: float) -> None:
    """Refuse the settings of `place` whose values are below their least one.

    Raises:
        MifoError: naming the first key and the values that it takes.
    """
    for key, bound in least.items():
        if (value := getattr(settings, key)) < bound:
            raise MifoError(f"{place}.{key}={value} is too small; take at least {bound}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """The beginning of a hint at the one of the `known` words that may be meant; empty if none is near."""
    near = get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}? Or " if near else ""


def refuse(reason: str) -> NoReturn:
    """End the process with one sentence and exit code 2."""
    print("mifo: error:", " ".join(reason.split()), file=sys.stderr)
    sys.exit(2)
