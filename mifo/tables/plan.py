"""Which runs a table needs, and what each of them is known by."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from itertools import product
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track

from mifo.config.checks import check
from mifo.config.compose import REFUSALS, compose, explain, key_of, settings_of
from mifo.config.identity import fingerprint
from mifo.config.location import scenes_called
from mifo.config.schema import RunSettings
from mifo.config.sections import section as typed_section
from mifo.data.photo_folder import folder_digest
from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError, nearest
from mifo.tables.asked import is_wanted
from mifo.tables.settings import TableSettings

Composed = tuple[RunSettings | None, str | None]  # settings, or why they are refused

# what comes after learning: runs that differ in these alone learn the same
_AFTER_LEARNING = {"layout", "guidance", "synthesis", "metrics"}
_ANYWHERE = "paths.output=unknown"  # a run's folder follows from its identity, so that it is no part of it
_REFUSED = (MifoError, *REFUSALS)


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

    @cached_property
    def key(self) -> str:
        """Hash of the resolved configuration, and of the user's image and masks where there are some."""
        return fingerprint(self._identity())

    @cached_property
    def learning_key(self) -> str:
        """Runs of one such key have the same `learned/`."""
        return fingerprint(self._identity(), _AFTER_LEARNING)

    def _identity(self) -> dict[str, Any]:
        assert self.settings is not None  # a run with an error is not asked
        files = folder_digest(self.settings.instances)
        return asdict(self.settings) | ({} if files is None else {"files": files})

    def __str__(self) -> str:
        return f"{self.row}, {self.instances}, seed {self.seed}"


def plan(name: str, settings: TableSettings, overrides: list[str]) -> list[Run]:
    """Every run of the table `name`, composed and checked; a refused one spoils no other.

    Raises:
        MifoError: an override of every run sets a key in which rows differ, a seed stands there twice, or a
            page is asked of a scene that the table does not have.
    """
    if len({*settings.seeds}) < len(settings.seeds):
        raise MifoError(f"seeds={settings.seeds} names a seed twice, which would count twice; name it once")
    _check_differences(settings, overrides)
    scenes = _scenes(settings)
    known = [option for _, option in scenes]
    for page in settings.pages or []:
        if page not in known:
            near = nearest(page, known)
            raise MifoError(f"table.pages: {page} is no scene of this table; {near}take one of its scenes")
    runs = []
    for row, deltas in track(_rows(settings), "plan", console=Console(stderr=True)):
        cells = {}
        for _, instances in scenes:
            group = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{name}-{row}-{instances}")
            cells[instances] = [
                f"instances={instances}",
                f"group={group}",
                f"tags=[{name}]",
                *deltas,
                *overrides,
            ]
        composed = compose_row(cells)
        for label, instances in scenes:
            typed, refusal = composed[instances]
            for seed in settings.seeds:
                given = (*cells[instances], f"seed={seed}")
                own = typed and replace(
                    typed,
                    seed=seed,
                    origin=replace(typed.origin, overrides=[*given], table=name, row=row, set=label),
                )
                runs.append(Run(row, label, instances, seed, given, own, refusal))
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
    composed = [(label, compose_cell([f"instances={instances}", *row, *others])[0]) for label, row in rows]
    known = [(label, OmegaConf.structured(typed)) for label, typed in composed if typed is not None]
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


def compose_row(cells: Mapping[str, list[str]]) -> dict[str, Composed]:
    """As `compose_cell` for every scene of a row, but Hydra composes the row once, on its first scene.

    The other scenes differ in `instances` and `group` alone; a row whose scenes differ in more is composed
    scene by scene.

    Args:
        cells: overrides by scene, which begin with `instances=SCENE` and `group=NAME`.
    """
    first, *_ = cells
    own = tuple(text for text in cells[first][1:] if key_of(text).partition(".")[0] == "instances")
    try:
        config = compose("run", [*cells[first], _ANYWHERE])
        typed = settings_of(config)
        is_usual = typed.instances == _instances(first, own) and f"group={typed.group}" == cells[first][1]
    except _REFUSED:
        is_usual = False
    if not is_usual:
        return {scene: compose_cell(given) for scene, given in cells.items()}
    others = OmegaConf.masked_copy(config, [key for key in config if key not in ("instances", "group")])
    is_read = re.search(r"\$\{[^}]*(instances|group|called)", OmegaConf.to_yaml(others))
    found: dict[str, Composed] = {}
    for scene, given in cells.items():
        try:
            origin = replace(
                typed.origin,
                choices={**typed.origin.choices, "instances": scene},
                overrides=[*given, _ANYWHERE],
            )
            part = {
                "instances": _instances(scene, own),
                "group": given[1].partition("=")[2],
                "origin": origin,
            }
            each = settings_of(OmegaConf.merge(config, part)) if is_read else replace(typed, **part)
            check(each)
            found[scene] = each, None
        except _REFUSED as error:
            found[scene] = None, explain(error, "run")
    return found


@cache
def _instances(scene: str, overrides: tuple[str, ...]) -> InstancesSettings:
    given = compose("layout", [f"instances={scene}", *overrides])  # the smallest task with instances
    return typed_section("mifo.data.settings.InstancesSettings", given.instances)


def compose_cell(overrides: list[str]) -> Composed:
    """The checked settings of a run with these overrides, or None and why they are refused."""
    try:
        typed = settings_of(compose("run", [*overrides, _ANYWHERE]))
        check(typed)
    except _REFUSED as error:
        return None, explain(error, "run")
    return typed, None


def _rows(settings: TableSettings) -> list[tuple[str, list[str]]]:
    rows = [each for each in settings.rows.items() if is_wanted(each[0], settings.only)]
    for values in product(*settings.grid.values()) if settings.grid else ():
        deltas = [f"{key}={value}" for key, value in zip(settings.grid, values, strict=True)]
        rows.append((", ".join(delta.removeprefix("penalty.") for delta in deltas), deltas))
    return rows


def _scenes(settings: TableSettings) -> list[tuple[str, str]]:
    found: dict[tuple[str, str], None] = {}  # in order; two patterns of a set may fit one scene
    for name, patterns in settings.scenes.items():
        for pattern in patterns:
            matching = scenes_called(pattern)
            if not matching:
                raise MifoError(
                    f"table.scenes.{name}: no option of conf/instances and no drawn scene is called {pattern}"
                )
            found |= dict.fromkeys((name, option) for option in matching)
    return [*found]
