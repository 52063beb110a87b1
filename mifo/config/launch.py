"""Commands called by their names, so that what launches them imports none."""

from importlib import import_module
from typing import Any

from mifo.config.checks import check
from mifo.config.schema import TaskSettings


def perform(settings: TaskSettings) -> Any:
    """Check settings and run their command; returns what the command made.

    Raises:
        MifoError: the settings cannot work, or the command refuses them.
    """
    check(settings)
    return getattr(import_module(f"mifo.commands.{settings.task}"), settings.task)(settings)
