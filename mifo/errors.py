"""The one exception that a user is meant to read, what its sentences have in common, and what stops a job."""

import signal
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, NoReturn


class MifoError(Exception):
    """A refusal in one sentence that names what is wrong and how to put it right.

    The command line prints it without a traceback and exits with code 2.
    """


class Interrupted(BaseException):
    """A job was asked to stop.

    `code` is the exit code of the signal, `way_on` the command that continues the job.
    """

    def __init__(self, code: int, way_on: str | None = None) -> None:
        super().__init__(code, way_on)
        self.code, self.way_on = code, way_on


def check_least(place: str, settings: Any, **least: float) -> None:
    """Refuse the settings of `place` ("" for the task itself) whose values are below their least one.

    Raises:
        MifoError: naming the first key and the values that it takes.
    """
    for key, bound in least.items():
        if (value := getattr(settings, key)) < bound:
            name = f"{place}.{key}".lstrip(".")
            raise MifoError(f"{name}={value} is too small; take at least {bound}.")


def check_known(key: str, value: object, known: Iterable[str]) -> None:
    """Refuse a value of the setting `key` that is none of the `known` ones."""
    if value not in (known := tuple(known)):
        raise MifoError(f"{key}={value} is not known; take one of {', '.join(known)}.")


def check_package(user: str, package: str, extra: str | None = None) -> None:
    """Refuse what needs a package that is not installed.

    Args:
        user: what needs it, as the sentence's subject. extra: of MIFO, which brings the package.
    """
    if find_spec(package) is None:
        how = f"'mifo[{extra}]'" if extra else package
        raise MifoError(f"{user} needs the package {package}; install it with: pip install {how}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """The beginning of a hint at the one of the `known` words that may be meant; empty if none is near."""
    near = get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}? Or " if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def root_cause(error: BaseException) -> str:
    """The first line of what went wrong in the first place, of an exception raised from others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def signalled(error: BaseException | None) -> int | None:
    """The exit code of the signal that ended a job; None if none did. Lightning itself exits on Ctrl-C."""
    while error is not None:
        if isinstance(error, Interrupted):
            return error.code
        if isinstance(error, KeyboardInterrupt):
            return 128 + signal.SIGINT
        if type(error).__name__ == "SIGTERMException":
            return 128 + signal.SIGTERM
        error = error.__cause__ or error.__context__
    return None


def told(error: BaseException) -> str:
    """What a record of a failed run says: a refusal's sentence, or the class and the message."""
    return str(error) if isinstance(error, MifoError) else f"{type(error).__name__}: {error}"


def refuse(reason: str) -> NoReturn:
    """End the process with one sentence and exit code 2."""
    print("mifo: error:", " ".join(reason.split()), file=sys.stderr)
    sys.exit(2)
