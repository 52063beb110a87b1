"""`mifo doctor`: the whole setup of a run, checked in seconds before an hour of a GPU is spent."""

import logging
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from mifo.commands.readiness import ALL, Setup
from mifo.config.checks import check
from mifo.config.schema import RunSettings
from mifo.errors import MifoError

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def doctor(settings: RunSettings) -> list[tuple[str, str, str]]:
    """Print a line for all that is right, doubtful or wrong; returns level, subject and text of each.

    Raises:
        MifoError: after all lines, if one is an error.
    """
    setup, lines = Setup(settings), list[tuple[str, str, str]]()
    console = Console(soft_wrap=True)
    checks: dict[str, Callable[[Setup], str]] = {
        "settings": _settings,
        **{each.__name__: each for each in ALL},
    }
    for name, made in checks.items():
        told = _Warnings()
        try:
            with told:
                found = ("ok", name, made(setup))
        except MifoError as error:
            found = ("error", name, str(error))
        except Exception:
            # what reads refused settings can break on them; the line of the settings says what to mend
            if ("error", "settings") not in [line[:2] for line in lines]:
                raise
            continue
        new = [("warning", name, text) for text in told.texts]
        # a part that cannot be read is told by the first check that needs it
        if found[0] == "ok" or found[2] not in [text for _, _, text in lines + new]:
            new.append(found)
        for level, name, text in new:
            console.print(f"[{_COLOURS[level]}]{level:<8}[/]{name:<11}{escape(text)}", highlight=False)
        lines += new
    if errors := sum(level == "error" for level, *_ in lines):
        raise MifoError(
            f"the setup has {errors} error{'s' * (errors > 1)}; the lines above say how to mend it"
        )
    return lines


def _settings(setup: Setup) -> str:
    check(setup.settings)
    return f"method {setup.settings.told_method}, seed {setup.settings.seed}"


class _Warnings(logging.Handler):
    """Takes the warnings of MIFO's own modules while a check is made."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(" ".join(record.getMessage().split()))

    def __enter__(self) -> None:
        logger = logging.getLogger("mifo")
        self._before = logger.propagate
        logger.propagate = False  # the lines of the doctor tell them
        logger.addHandler(self)

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("mifo")
        logger.removeHandler(self)
        logger.propagate = self._before
