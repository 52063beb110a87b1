"""Which runs a table needs, and what each of them is known by."""

import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track

import mifo
from mifo.config.checks import check
from mifo.config.compose import REFUSALS, compose, explain, settings_of
from mifo.config.identity import fingerprint
from mifo.config.location import conf_folder
from mifo.config.schema import RunSettings
from mifo.data.photo_folder import folder_digest
from mifo.errors import MifoError
from mifo.tables.settings import TableSettings, key_of

CELLS_PER_PROCESS = 16  # Hydra composes one in 0.3 s; a process of its own starts in some seconds

# what comes after learning: runs that differ in these alone learn the same
_AFTER_LEARNING = {"layout", "guidance", "synthesis", "metrics"}
_STATES = {True: " (dirty)", False: "", None: " (no git)"}


@dataclass(frozen=True)
class CodeVersion:
    """`digest` of the package's files; `commit` and `dirty` (changes not committed) where git knows them.

    Both are None where no git keeps the package: whether it was changed is not known there.
    """

    digest: str
    commit: str | None
    dirty: bool | None

    def __str__(self) -> str:
        return f"{(self.commit or self.digest)[:8]}{_STATES[self.dirty]}"


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a table. `settings` is None, and `error` says why, if its configuration is refused."""

    row: str
    scenes: str
    instances: str
    seed: int
    overrides: tuple[str, ...]
    settings: RunSettings | None
    error: str | None = None

    @property
    def key(self) -> str:
        """Hash of the resolved configuration, and of the user's image and masks where there are some."""
        return fingerprint(self._identity())

    @property
    def learning_key(self) -> str:
        """Runs of one such key have the same `learned/`."""
        return fingerprint(self._identity(), _AFTER_LEARNING)

    def _identity(self) -> dict[str, Any]:
        files = folder_digest(self.settings.instances)
        return asdict(self.settings) | ({} if files is None else {"files": files})

    def __str__(self) -> str:
        return f"{self.row}, {self.instances}, seed {self.seed}"


def plan(name: str, settings: TableSettings, overrides: list[str]) -> list[Run]:
    """Every run of the table `name`, composed and checked; a refused one spoils no other.

    Raises:
        MifoError: an override of every run sets a key in which rows differ.
    """
    _check_differences(settings, overrides)
    cells = []
    for (row, deltas), (scenes, instances) in product(_rows(settings), _scenes(settings)):
        group = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{name}-{row}-{instances}")
        given = [f"instances={instances}", f"group={group}", f"tags=[{name}]", *deltas, *overrides]
        cells.append((row, scenes, instances, given))
    runs = []
    composed = _composed([given for *_, given in cells])
    for (row, scenes, instances, given), (typed, refusal) in zip(cells, composed, strict=True):
        for seed in settings.seeds:
            own = typed and replace(typed, seed=seed)
            runs.append(Run(row, scenes, instances, seed, (*given, f"seed={seed}"), own, refusal))
    _check_measures(runs)
    return runs


def _check_measures(runs: Sequence[Run]) -> None:
    """Refuse rows whose figures would not compare, before any of them is made."""
    firsts: dict[str, Run] = {}
    for run in runs:
        if run.settings is None:
            continue
        if run.settings.metrics is None:
            raise MifoError(f"row '{run.row}' has metrics=none, which leaves its runs without a figure")
        first = firsts.setdefault(run.instances, run)
        for section, free in (("metrics", {"batch_size"}), ("layout", set())):
            own, other = (asdict(getattr(each.settings, section)) for each in (run, first))
            if different := [key for key in own if own[key] != other[key] and key not in free]:
                raise MifoError(
                    f"the rows '{first.row}' and '{run.row}' differ in {section}.{different[0]}: figures of "
                    "other prompts, boxes or evaluators do not compare; make a table for each"
                )


def _check_differences(settings: TableSettings, overrides: list[str]) -> None:
    """Refuse single keys by which rows, or the options that they take, would no longer differ."""
    single = [each for each in overrides if each not in settings.overrides and "." in key_of(each)]
    if not single:
        return
    others = [each for each in overrides if each not in single]
    (_, instances), *_ = _scenes(settings)
    rows = _rows(settings)
    composed = _composed([[f"instances={instances}", *row, *others] for _, row in rows])
    known = [
        (label, OmegaConf.structured(typed))
        for (label, _), (typed, _) in zip(rows, composed, strict=True)
        if typed is not None
    ]
    for override in single:
        key = key_of(override)
        values = [(label, OmegaConf.select(config, key)) for label, config in known]
        for label, value in values:
            first, usual = values[0]
            if value != usual:
                raise MifoError(
                    f"{key} is {usual} in the table's row '{first}' and {value} in its row '{label}', which "
                    f"{override} would make alike; give 'table.rows={{LABEL: [{override}]}}' instead"
                )


def _composed(wanted: Sequence[list[str]]) -> list[tuple[RunSettings | None, str | None]]:
    """The settings of each list of overrides, or why they are refused; many of them in several processes."""
    processes = min(os.cpu_count() or 1, len(wanted) // CELLS_PER_PROCESS)
    show = partial(track, description="plan", total=len(wanted), console=Console(stderr=True))
    if processes < 2:
        return list(show(map(_settings_or_refusal, wanted)))
    # not forked: a copy of a process with threads may wait for a lock for ever
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return list(show(pool.map(_settings_or_refusal, wanted)))


def _settings_or_refusal(overrides: list[str]) -> tuple[RunSettings | None, str | None]:
    try:
        # the folder of a run follows from its identity, so that it cannot be part of it
        typed = settings_of(compose("run", [*overrides, "paths.output=unknown"]))
        check(typed)
    except (MifoError, *REFUSALS) as error:
        return None, explain(error, "run")
    return typed, None


@cache
def code_version() -> CodeVersion:
    """The version of the package, but for `mifo/tables`, which computes nothing that is measured."""
    package = Path(mifo.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        inside = path.relative_to(package)
        if path.is_file() and "__pycache__" not in inside.parts and inside.parts[0] != "tables":
            digest.update(str(inside).encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    # an installed package may lie in a repository that is not its own
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return CodeVersion(digest.hexdigest()[:12], None, None)
    commit = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--", str(package), str(conf_folder()))
    return CodeVersion(digest.hexdigest()[:12], commit, None if changed is None else bool(changed))


def _rows(settings: TableSettings) -> list[tuple[str, list[str]]]:
    rows = list(settings.rows.items())
    for values in product(*settings.grid.values()) if settings.grid else ():
        deltas = [f"{key}={value}" for key, value in zip(settings.grid, values, strict=True)]
        rows.append((", ".join(delta.removeprefix("penalty.") for delta in deltas), deltas))
    return rows


def _scenes(settings: TableSettings) -> list[tuple[str, str]]:
    known = sorted(path.stem for path in (conf_folder() / "instances").glob("*.yaml"))
    found = []
    for name, patterns in settings.scenes.items():
        for pattern in patterns:
            matching = [option for option in known if fnmatch(option, pattern)]
            if not matching:
                raise MifoError(f"table.scenes.{name}: no option of conf/instances is called {pattern}")
            found += [(name, option) for option in matching]
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
