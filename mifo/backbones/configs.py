"""The small files of a pipeline's parts, read and checked against the classes that take them."""

import inspect
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from transformers import PreTrainedModel

from mifo.errors import MifoError
from mifo.files import read_json, typed

Config = dict[str, Any]
"""What a configuration file or model_index.json holds."""
Configs = dict[str, Config]
"""Configurations of a pipeline's networks, by part."""


def read_config(file: Path, kind: Any = None) -> Config:
    """A configuration, whose values have the types that the class `kind` of diffusers or transformers takes.

    Keys that the class does not take stay as they are.

    Raises:
        MifoError: the file is damaged, or a value is of another type; it names the file and the key.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise MifoError(f"{file} is damaged: it holds no object with keys")
    if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
        try:
            # it checks the types itself; transformers does not annotate the attribute
            kind.config_class.from_dict(content)  # type: ignore[attr-defined]
        except Exception as error:  # of the library's own class
            raise MifoError(f"{file} is damaged: {' '.join(str(error).split())}") from error
    elif kind is not None:
        hints = get_type_hints(kind.__init__)
        for key, taken in inspect.signature(kind).parameters.items():
            if key in content and not _is_taken(content[key], hints.get(key), taken.default):
                raise MifoError(
                    f"{file} is damaged: {key} holds {str(content[key])[:40]!r}, where {kind.__name__} takes "
                    f"({taken})"
                )
    return content


def with_defaults(config: Config, kind: Any) -> Config:
    """A configuration with the defaults of its class for keys that it lacks."""
    taken = inspect.signature(kind).parameters.items()
    return {key: each.default for key, each in taken if each.default is not each.empty} | config


def _is_taken(value: Any, hint: Any, default: Any) -> bool:
    """Whether a value of JSON is of the type of a parameter: the annotated one, or else that of its default.

    What a list holds is left to the class, which builds its layers of it.
    """
    if value is None:  # published configurations say null for false
        return default is None or isinstance(default, bool) or type(None) in get_args(hint)
    if hint is None:
        hint = Any if default is None else type(default)
    if isinstance(value, list):
        return any((get_origin(each) or each) in (tuple, list, Any) for each in (hint, *get_args(hint)))
    try:
        typed(value, hint, Path())
    except TypeError:
        return False
    return True
