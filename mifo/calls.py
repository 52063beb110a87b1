"""The commands as Python functions, for notebooks and scripts."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mifo.config.compose import REFUSALS, compose, explain, settings_of, written
from mifo.config.jobs import Job, unlock_folder
from mifo.config.launch import perform
from mifo.config.location import fresh_folder
from mifo.errors import MifoError, signalled, told


def call(task: str, overrides: tuple[str, ...], keys: Mapping[str, Any]) -> Any:
    """Run a command with the defaults of the command line; returns what the command makes.

    Args:
        overrides: as they are typed, "model=sd15" or "learning.semantic.steps=300".
        keys: the same by their names: a mapping stands for a section, {"semantic": {"steps": 300}}. `folder`
            is the run's own folder; by default outputs/TASK/DATE_TIME.

    Raises:
        MifoError: a setting is refused.
    """
    own = dict(keys)
    place = own.pop("folder", None) or fresh_folder(task)
    if not isinstance(place, str | os.PathLike):
        raise MifoError(f"folder={place!r} is no path; name the run's folder, or leave it out")
    if others := [text for text in overrides if not isinstance(text, str)]:
        raise MifoError(
            f"mifo.{task}({others[0]!r}): give settings as text, such as 'seed=1', or by name, seed=1"
        )
    folder = Path(os.path.abspath(place))
    given = [*overrides, *(f"{key}={written(value)}" for key, value in _flat(own))]
    for text in given:
        if re.match(r"\+{0,2}(resume|paths|exclusive_gpu|hydra)\b", text):
            raise MifoError(
                f"{text} belongs to the command line; name the run's folder by folder=…, which goes on with "
                "a run of the same settings"
            )
    try:
        config = compose(task, [*given, f"paths.output={written(folder)}"])
    except REFUSALS as error:
        raise MifoError(explain(error, task)) from error
    try:
        job = Job(folder, given, alone=True)
    except OSError as error:
        raise MifoError(f"folder={folder} cannot be written ({error.strerror}); choose another") from error
    try:
        job.tell("running")
        result = perform(settings_of(config))
        job.tell("ok")
        return result
    except BaseException as error:
        if code := signalled(error):
            job.stop(code)
        else:
            job.fail(told(error))
        raise
    finally:
        unlock_folder(folder)


def _flat(keys: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested mappings; an empty mapping is a value."""
    for key, value in keys.items():
        # a name such as "red ball" cannot stand in a dotted key
        if isinstance(value, Mapping) and value and all(re.fullmatch(r"[\w.@/]+", str(k)) for k in value):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
