"""When two runs are the same run, and when they differ by their seed alone."""

import hashlib
import json
import re
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import Container, DictConfig, OmegaConf

from mifo.config.location import conf_folder
from mifo.files import read_yaml

# says where a run goes and who is told about it, not what it computes
NOT_IDENTITY = frozenset(
    "task origin paths resume again logger callbacks group tags exclusive_gpu objectives sheet".split()
)
# keys that records older than them lack, at the value with which a run computes what it did before
_YOUNGER = {"guidance": {"margin": 0.0}}
_STATES = {True: " (dirty)", False: "", None: " (no git)"}
# overrides that say nothing of what a run is called; its scene and its seed are named anyway
_UNSAID = NOT_IDENTITY | {"instances", "seed", "device", "trainer", "performance"}
_LONGEST = 80  # letters beside scene and seed; Weights & Biases takes names of 128


@dataclass(frozen=True)
class CodeVersion:
    """`digest` of the package's files; `commit` of its own repository and `dirty` (changes not committed).

    Both are None outside a checkout of MIFO, whatever repository surrounds the package: whether it was
    changed is not known there.
    """

    digest: str
    commit: str | None
    dirty: bool | None

    @property
    def name(self) -> str:
        """The commit; without one, the version of the package and the digest, as 0.1.0+1f2e3d4c5b6a."""
        return self.commit or f"{_installed_version()}+{self.digest}"

    def __str__(self) -> str:
        return f"{(self.commit or self.digest)[:8]}{_STATES[self.dirty]}"


def fingerprint(settings: Mapping[str, Any], without: Collection[str] = ()) -> str:
    """A hash of resolved settings that are a run's identity, but for the keys in `without`."""
    kept = {key: value for key, value in settings.items() if key not in NOT_IDENTITY and key not in without}
    for group, usual in _YOUNGER.items():
        if kept.get(group):
            kept[group] = {key: value for key, value in kept[group].items() if value != usual.get(key, ...)}
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


def run_signature(settings: Mapping[str, Any], files: str | None) -> str:
    """The hash that equal runs share, whatever code made them.

    Args:
        settings: of a task with instances, in plain types.
        files: the digest of the user's image and masks.
    """
    instances = settings["instances"]
    if instances["folder"]:
        place = str(Path(instances["folder"]).expanduser().absolute())
        instances = {**instances, "folder": place}
    return f"{settings['task']}-{fingerprint({**settings, 'instances': instances, 'files': files})}"


@cache
def listed_defaults(task: str) -> list[Any]:
    """What a task's file is composed of: groups with their options, and names of other files."""
    listed: list[Any] = read_yaml(conf_folder() / f"{task}.yaml")["defaults"]
    return listed


@cache
def _defaults(task: str) -> dict[str, str]:
    """The option of each group that a task takes unless another one is typed."""
    groups = (each for each in listed_defaults(task) if isinstance(each, dict))
    return {group: option for each in groups for group, option in each.items()}


def _called(seed: int | None = None, *, _root_: DictConfig) -> str:
    """`${called:}`: what a person would call a run and those that differ from it by their seed alone.

    What tells it from others comes first, since lists in dashboards are narrow: its row in a table, or else
    the choices that a sweep varies; then the seed, with `${called:${seed}}`, and the scene; then the other
    choices that were typed and are no defaults, groups before single keys.
    """
    origin = _root_.get("origin") or {}
    # the last of the same key wins, and a place is no choice
    typed = {
        (parts := text.lstrip("+").partition("="))[0]: parts[2]
        for text in origin.get("overrides") or []
        if "/" not in text
    }
    swept = origin.get("swept") or []
    chosen = [
        (key not in swept, key.count("."), _short(key) + f"={value}" * bool(value))
        for key, value in typed.items()
        if (key in swept or _defaults(_root_.task).get(key) != value)
        and re.split("[.@]", key.lstrip("~"), maxsplit=1)[0] not in _UNSAID
    ]
    said = [text[:_LONGEST] for *_, text in sorted(chosen)]
    while len(", ".join(said)) > _LONGEST:
        said.pop()
    if origin.get("row") or not said:
        said = [(origin.get("row") or _root_.get("method") or _root_.task)[:_LONGEST]]
    first = len(said)
    if seed is not None and swept and not origin.get("row"):
        first = sum(not late for late, *_ in chosen)
    instances = _root_.get("instances") or {}
    scene = instances.get("name")
    if scene == "local" and instances.get("folder"):
        scene = Path(instances["folder"]).name
    same = [*([] if seed is None else [f"seed {seed}"]), *([scene] if scene else [])]
    return ", ".join([*said[:first], *same, *said[first:]])


def _short(key: str) -> str:
    """The end of a dotted key; the group of a choice without its package."""
    return ".".join(key.partition("@")[0].split(".")[-2:])


def _steps_of(model: str) -> str:
    """`${steps_of:MODEL}`: the miniatures have steps and rates of their own, others the published."""
    return "miniature" if model.startswith("miniature") else "published"


def register_resolvers() -> None:
    """Make what the tasks of conf/ compute known to OmegaConf, such as `${called:}`."""
    OmegaConf.register_new_resolver("called", _called, replace=True)
    OmegaConf.register_new_resolver("of_all_seeds", _of_all_seeds, replace=True)
    OmegaConf.register_new_resolver("steps_of", _steps_of, replace=True)


@cache
def code_version() -> CodeVersion:
    """The version of the package, but for `mifo/tables`, which computes nothing that is measured."""
    return version_of(Path(__file__).parents[1], conf_folder())


def version_of(package: Path, conf: Path) -> CodeVersion:
    """The version of a package MIFO with the configuration that belongs to it."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        inside = path.relative_to(package)
        if path.is_file() and "__pycache__" not in inside.parts and inside.parts[0] != "tables":
            digest.update(str(inside).encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    # the package may lie in a repository that is not its own: installed there, or copied into it
    if _git(package, "ls-files", "--full-name", "__init__.py") != "mifo/__init__.py":
        return CodeVersion(digest.hexdigest()[:12], None, None)
    commit = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--", str(package), str(conf))
    return CodeVersion(digest.hexdigest()[:12], commit, None if changed is None else bool(changed))


def told_code() -> str:
    """The code of a record that a person reads: commit, or version and digest."""
    code = code_version()
    return str(code) if code.commit else code.name


def _installed_version() -> str:
    try:
        return version("mifo")
    except PackageNotFoundError:
        return "not installed"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
