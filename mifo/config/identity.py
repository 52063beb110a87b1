"""What two runs must have in common to be the same run, and what their seeds must to be averaged."""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from omegaconf import Container, DictConfig, OmegaConf

# says where a run goes and who is told about it, not what it computes
NOT_IDENTITY = frozenset(
    (
        "task",
        "paths",
        "resume",
        "logger",
        "callbacks",
        "group",
        "tags",
        "exclusive_gpu",
        "objectives",
        "sheet",
    )
)


def fingerprint(settings: Mapping[str, Any], without: Collection[str] = ()) -> str:
    """A hash of resolved settings that are a run's identity, but for the keys in `without`."""
    kept = {key: value for key, value in settings.items() if key not in NOT_IDENTITY and key not in without}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _of_all_seeds(*, _root_: DictConfig) -> str:
    """`${of_all_seeds:}` in a configuration: the same for runs that differ by their seed alone."""
    kept = {key: _root_[key] for key in _root_ if key not in NOT_IDENTITY and key != "seed"}
    plain = {
        key: OmegaConf.to_container(value, resolve=True, enum_to_str=True)
        if isinstance(value, Container)
        else value
        for key, value in kept.items()
    }
    return fingerprint(plain)[:6]


def _steps_of(model: str) -> str:
    """`${steps_of:MODEL}`: the miniatures have steps and rates of their own, others the published."""
    return "miniature" if model.startswith("miniature") else "published"


def register_resolvers() -> None:
    """Make `${of_all_seeds:}` and `${steps_of:MODEL}` known to OmegaConf."""
    OmegaConf.register_new_resolver("of_all_seeds", _of_all_seeds, replace=True)
    OmegaConf.register_new_resolver("steps_of", _steps_of, replace=True)
