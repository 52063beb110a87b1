"""What a table or a tuning is asked: a file in a folder of experiments/, changed by the command line."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from mifo.config.compose import key_of, refused
from mifo.errors import MifoError, nearest
from mifo.files import read_yaml


def read_asked(
    folder: Path,
    task: str,
    example: str,
    schema: type,
    arguments: Sequence[str],
    labelled: Sequence[str],
) -> tuple[Any, set[str], list[str]]:
    """Read `folder/TASK.yaml` with the command line on top of it.

    Args:
        task: table | tune. example: a folder that has one. schema: the dataclass of what is asked.
        arguments: `TASK.KEY=VALUE` changes what is asked.
        labelled: keys whose own keys are the user's; the command line replaces them as a whole.

    Returns:
        What is asked, with plain dicts for what its dataclass nests, which of its keys the command line
        changed, and the other arguments.

    Raises:
        MifoError: no such file, an unknown key, or a value that it does not take.
    """
    file = folder / f"{task}.yaml"
    if not file.is_file():
        raise MifoError(f"{folder} holds no {file.name}; name a folder, such as mifo {task} {example}")
    prefix = f"{task}."
    own = [text.removeprefix(prefix) for text in arguments if text.startswith(prefix)]
    others = [text for text in arguments if not text.startswith(prefix)]
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise MifoError(f"{file} holds no keys with values")
    try:
        changed = OmegaConf.from_dotlist(own)
    except YAMLError as error:
        raise MifoError(f"a {prefix}KEY=VALUE cannot be read: {' '.join(str(error).split())}") from error
    try:
        given = OmegaConf.create(content)
        for key in labelled:  # a subset of them is what one wants
            if key in {key_of(text) for text in own}:
                given.pop(key, None)
        typed = OmegaConf.structured(schema)
        _check_kinds(typed, given, f"{file}: ")
        _check_kinds(typed, changed, prefix)
        merged = OmegaConf.merge(typed, given, changed)
        # interpolations in overrides are for the runs to resolve
        asked = schema(**OmegaConf.to_container(merged, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise MifoError(_explain(error, file, task, schema, changed, labelled)) from error
    return asked, {str(key) for key in changed}, others


def _check_kinds(typed: DictConfig, given: DictConfig, place: str) -> None:
    """Refuse one value where a list is asked, and what else OmegaConf refuses without naming the key."""
    for key in given:
        node, value = typed._get_node(str(key), validate_access=False), given._get_node(key)
        for is_kind, example in ((OmegaConf.is_list, "[ONE, OTHER]"), (OmegaConf.is_dict, "{LABEL: VALUE}")):
            if is_kind(node) and not is_kind(value) and given[key] is not None:
                raise MifoError(f"{place}{key}={given[key]} must be written as {example}")


def _explain(
    error: OmegaConfBaseException,
    file: Path,
    task: str,
    schema: type,
    changed: DictConfig,
    labelled: Sequence[str],
) -> str:
    """One sentence for what OmegaConf refused, in `file` or `changed` by the command line."""
    reason = refused(error)
    if not error.full_key:
        return f"{file}: {reason}"
    first, _, label = error.full_key.partition(".")
    prefix, place = (f"{task}.", "") if first in changed else ("", f"{file}: ")
    key = prefix + error.full_key
    if isinstance(error, ConfigKeyError):
        near = nearest(key, [prefix + each.name for each in fields(schema)])
        return f"{place}{key} is no key of a {file.stem}; {near}see mifo {task} --help"
    hint = f'; quote a label that holds a comma: {{"{label}, …": […]}}' if first in labelled and label else ""
    return f"{place}{key}: {reason}{hint}"


def of_hydra(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that choose how Hydra launches, and the others."""
    own = [text for text in arguments if key_of(text).startswith(("hydra/", "hydra."))]
    return own, [text for text in arguments if text not in own]


def check_fixed(
    task: str, fixed: Mapping[str, str], overrides: Sequence[str], instead: Callable[[str, str], str]
) -> None:
    """Refuse `overrides` of every run that would replace what its runs are told apart by.

    Args:
        task: table | tune. fixed: what sets a key, by the key.
        instead: the argument that one gives instead, of what sets the key and the override.
    """
    if "method" in fixed:  # whose options choose these groups
        fixed = {**fixed, **dict.fromkeys(("penalty", "recipe"), fixed["method"])}
    for override in overrides:
        if (key := key_of(override)) in fixed:
            raise MifoError(
                f"{key} is set by the {task}'s {fixed[key]}, which {override} would falsify; "
                f"give '{instead(fixed[key], override)}' instead"
            )


def wants_own_gpu(overrides: Sequence[str]) -> bool:
    """Whether the last override of `exclusive_gpu`, if there is one, says true."""
    found = [text.partition("=")[2] for text in overrides if key_of(text) == "exclusive_gpu"]
    return bool(found) and found[-1].lower() == "true"


def check_only(key: str, only: Sequence[str], labels: Iterable[str]) -> None:
    """Refuse a pattern of `only` that none of the `labels` fits."""
    for pattern in only:
        if not any(is_wanted(label, [pattern]) for label in labels):
            raise MifoError(f"{key}: none is called {pattern}; take some of {', '.join(labels)}")


def is_wanted(label: str, only: Sequence[str]) -> bool:
    """Whether a label fits one of the patterns, in which * is any text; without patterns every label does."""
    return not only or any(fnmatch(label, pattern) for pattern in only)
