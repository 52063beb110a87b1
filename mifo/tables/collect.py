"""What finished runs say together: means with intervals, paired differences, the Pareto front."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from mifo.metrics.scores import score_table
from mifo.tables.plan import Run
from mifo.tables.record import Entry


@dataclass(frozen=True)
class Estimate:
    """A mean of `count` values from `runs` runs of `scenes`, and half the width of its 95 % interval.

    `half` is None where there is one value.
    """

    mean: float
    half: float | None
    count: int
    runs: int
    scenes: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


Cells = Mapping[tuple[str, str], Mapping[str, Estimate]]
"""(row, set of scenes) → metric → estimate."""


@dataclass(frozen=True)
class Measured:
    """One finished run in a table: where it belongs, and its value of each metric."""

    row: str
    scenes: str
    instances: str
    seed: int
    values: dict[str, float]


def measured(entries: Sequence[tuple[Run, Entry]]) -> list[Measured]:
    """The scores of every finished run.

    Raises:
        MifoError: runs were measured by different evaluators or protocols.
    """
    values = score_table({entry.name: entry.scores for _, entry in entries})
    return [
        Measured(run.row, run.scenes, run.instances, run.seed, values[entry.name]) for run, entry in entries
    ]


def estimate(values: Sequence[float], runs: int, scenes: int) -> Estimate:
    """Mean and half-width t₀.₉₇₅(n − 1)·s/√n of independent `values` from so many runs of so many scenes."""
    count = len(values)
    half = None
    if count > 1:
        half = float(student.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return Estimate(float(np.mean(values)), half, count, runs, scenes)


def estimate_runs(values: Mapping[tuple[str, int], float]) -> Estimate:
    """The estimate of values by (scene, seed).

    Seeds of one scene are no independent evidence about other scenes: a scene's mean counts as one value,
    unless there is one scene only, where each seed does.
    """
    scenes = sorted({scene for scene, _ in values})
    if len(scenes) == 1:
        return estimate(list(values.values()), len(values), 1)
    of_scenes = ([value for (own, _), value in values.items() if own == scene] for scene in scenes)
    return estimate([float(np.mean(each)) for each in of_scenes], len(values), len(scenes))


def cells(runs: Sequence[Measured], metrics: Sequence[str]) -> dict[tuple[str, str], dict[str, Estimate]]:
    """(row, set of scenes) → metric → estimate, in the order of the runs."""
    return {
        cell: {metric: estimate_runs(found) for metric in metrics if (found := _values(runs, cell, metric))}
        for cell in _cells(runs)
    }


def differences(
    runs: Sequence[Measured], metrics: Sequence[str], first: str
) -> dict[tuple[str, str], dict[str, Estimate]]:
    """As `cells`, of each row minus the row `first`, paired by scene and seed."""
    found: dict[tuple[str, str], dict[str, Estimate]] = {}
    for row, scenes in _cells(runs):
        if row == first:
            continue
        for metric in metrics:
            own, other = _values(runs, (row, scenes), metric), _values(runs, (first, scenes), metric)
            if paired := {key: own[key] - other[key] for key in own.keys() & other.keys()}:
                found.setdefault((row, scenes), {})[metric] = estimate_runs(paired)
    return found


def partial_cells(found: Cells) -> set[tuple[str, str, str]]:
    """(row, scenes, metric) where another row has more scenes: this one may have the easy ones alone.

    So where a set has one scene, and another row has more seeds of it.
    """
    most: dict[tuple[str, str], tuple[int, int]] = {}
    for (_, scenes), estimates in found.items():
        for metric, each in estimates.items():
            most[scenes, metric] = max((each.scenes, each.count), most.get((scenes, metric), (0, 0)))
    return {
        (row, scenes, metric)
        for (row, scenes), estimates in found.items()
        for metric, each in estimates.items()
        if (each.scenes, each.count) < most[scenes, metric]
    }


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates (larger is better), left to right."""
    front, best = [], -np.inf
    for index in sorted(range(len(points)), key=lambda i: points[i], reverse=True):
        if points[index][1] > best:
            front.append(index)
            best = points[index][1]
    return front[::-1]


def _cells(runs: Sequence[Measured]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((run.row, run.scenes) for run in runs))


def _values(runs: Sequence[Measured], cell: tuple[str, str], metric: str) -> dict[tuple[str, int], float]:
    return {
        (run.instances, run.seed): run.values[metric]
        for run in runs
        if (run.row, run.scenes) == cell and metric in run.values
    }
