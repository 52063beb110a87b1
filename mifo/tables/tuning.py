"""Tuning: every method gets the same number of trials by Optuna on the same scenes, all of them recorded."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import MISSING, OmegaConf

from mifo.config.compose import key_of
from mifo.config.launch import Launch
from mifo.errors import MifoError, check_known, check_package
from mifo.files import write_whole
from mifo.metrics.evaluation import METRICS
from mifo.report.tables import write_csv
from mifo.tables.asked import check_fixed, check_only, is_wanted, read_asked
from mifo.tables.collect import measured
from mifo.tables.execute import execute
from mifo.tables.plan import Run, plan
from mifo.tables.record import Entry, write_record
from mifo.tables.settings import TableSettings

LABELLED = ("methods", "objective")  # their keys are the user's


@dataclass
class MethodSettings:
    """What a method always has, and what is searched: each key with its least, first and largest value."""

    overrides: list[str] = field(default_factory=list)
    search: dict[str, list[Any]] = field(default_factory=dict)  # of numbers above 0


@dataclass
class TuningSettings:
    """What is tuned: `tune.yaml` in a folder of `experiments/`. Overrides are those of `mifo run`."""

    title: str = MISSING
    methods: dict[str, MethodSettings] = field(default_factory=dict)
    objective: dict[str, float] = field(default_factory=dict)  # metric → factor in the sum that is made large
    trials: int = 8  # of each method; the first has the first values of its search
    scenes: list[str] = field(default_factory=list)  # options of `instances`, which no table should use
    seeds: list[int] = field(default_factory=lambda: [0])
    seed: int = 0  # of the sampler of values
    overrides: list[str] = field(default_factory=list)  # of every run
    only: list[str] = field(default_factory=list)  # labels of the methods that are tuned; []: all
    runs: str = "outputs/runs"  # shared with tables
    record: str | None = None  # the results of an earlier tuning, whose runs count as they are
    results: str | None = None  # where the results go; None: outputs/tuning/NAME


HELP = """usage: mifo tune FOLDER [tune.KEY=VALUE ...] [override of every run ...]

  mifo tune experiments/tuning                                                  here, one by one
  mifo tune experiments/tuning hydra/launcher=joblib hydra.launcher.n_jobs=8    eight processes (extra joblib)
  mifo tune experiments/tuning tune.trials=2 debug=default                      a smoke test
  mifo tune experiments/tuning 'tune.only=[MIFO]'                               one method
  mifo tune experiments/tuning tune.record=FOLDER                               with runs of earlier results

FOLDER/tune.yaml says what is searched. Every method has one trial in each round (extra optuna). After each
round trials.csv, chosen.yaml with the rows of a table, and the record of all runs are written; the command
given again goes on, also with more trials.
Other methods, scenes or overrides need their own tune.results=FOLDER."""


@dataclass(frozen=True)
class Trial:
    """One trial of a method: its values, what they scored, and the objective; None where a run failed."""

    method: str
    number: int
    values: dict[str, float]
    scores: dict[str, float]
    objective: float | None

    @property
    def overrides(self) -> list[str]:
        return _overrides(self.values)


def read_tuning(folder: Path, arguments: Sequence[str]) -> tuple[TuningSettings, list[str]]:
    """Read `folder/tune.yaml` with the command line on top of it, see `read_asked`.

    Returns:
        What is tuned, and the overrides of every run on the command line.

    Raises:
        MifoError: optuna is missing, or there is no such file, an unknown key or metric, or a search without
            three rising positive numbers.
    """
    settings, _, overrides = read_asked(
        folder, "tune", "experiments/tuning", TuningSettings, arguments, LABELLED
    )
    settings.methods = {label: MethodSettings(**each) for label, each in settings.methods.items()}
    file = folder / "tune.yaml"
    check_package("mifo tune", "optuna", "optuna")
    if not settings.methods or not settings.scenes or not settings.objective or settings.trials < 1:
        raise MifoError(f"{file}: tuning needs methods, scenes, an objective and at least one trial")
    for metric in settings.objective:
        check_known(f"{file}: objective", metric, METRICS)
    for label, method in settings.methods.items():
        for key, values in method.search.items():
            if len(values) != 3 or not 0 < values[0] <= values[1] <= values[2]:
                raise MifoError(f"{file}: {label}: {key} needs its least, first and largest value, above 0")
    fixed = {"instances": "scenes", "seed": "seeds"}
    for label, method in settings.methods.items():
        fixed |= {key_of(text): f"method '{label}'" for text in (*method.overrides, *method.search)}

    def instead(place: str, override: str) -> str:
        value = override.partition("=")[2]
        return f"tune.{place}=[{value}]" if place in ("scenes", "seeds") else f"another value in {file}"

    check_fixed("tuning", fixed, overrides, instead)
    check_only("tune.only", settings.only, settings.methods)
    settings.methods = {
        label: each for label, each in settings.methods.items() if is_wanted(label, settings.only)
    }
    return settings, overrides


def tune(
    name: str, settings: TuningSettings, overrides: Sequence[str], launch: Launch, record: Mapping[str, Entry]
) -> Iterator[tuple[list[Trial], list[tuple[Run, Entry]]]]:
    """All trials so far and the runs behind them, after each round of one trial of each method.

    Args:
        launch, record: as of `mifo.tables.execute.execute`; runs that are there are not made again, and the
            sampler chooses the same values again, so that an interrupted tuning goes on.
    """
    optuna = import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searches = {
        label: optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=settings.seed, n_startup_trials=4)
        )
        for label in settings.methods
    }
    for label, method in settings.methods.items():
        searches[label].enqueue_trial({key: first for key, (_, first, _) in method.search.items()})
    trials: list[Trial] = []
    made: list[tuple[Run, Entry]] = []
    for number in range(settings.trials):
        asked = {label: search.ask() for label, search in searches.items()}
        values = {
            label: {
                # three digits, so that a value is what its override says
                key: float(f"{asked[label].suggest_float(key, low, high, log=True):.3g}")
                for key, (low, _, high) in method.search.items()
            }
            for label, method in settings.methods.items()
        }
        rows = {
            _row(label, number): [*method.overrides, *_overrides(values[label])]
            for label, method in settings.methods.items()
        }
        scenes = {"tuning": settings.scenes}
        table = TableSettings(
            settings.title, rows, scenes=scenes, seeds=settings.seeds, overrides=settings.overrides
        )
        runs = plan(name, table, [*settings.overrides, *overrides])
        if refused := next((run.error for run in runs if run.error), None):
            raise MifoError(f"a run of the tuning is refused: {refused}")
        ended = execute(runs, Path(settings.runs), launch, 1, any_code=False, record=record)
        done = [(each.run, each.entry()) for each in ended if each.is_finished]
        made += done
        found = measured(done)
        for label in settings.methods:
            row = _row(label, number)
            own = [each.values for each in found if each.row == row]
            planned = sum(run.row == row for run in runs)
            trials.append(_trial(label, number, values[label], own, planned, settings))
            if (objective := trials[-1].objective) is None:
                searches[label].tell(asked[label], state=optuna.trial.TrialState.FAIL)
            else:
                searches[label].tell(asked[label], objective)
        yield trials, made


def _row(method: str, number: int) -> str:
    """What a trial is called among the rows of a table."""
    return f"{method}, trial {number}"


def _overrides(values: Mapping[str, float]) -> list[str]:
    return [f"{key}={value:g}" for key, value in values.items()]


def _trial(
    label: str,
    number: int,
    values: dict[str, float],
    scores: Sequence[Mapping[str, float]],
    planned: int,
    settings: TuningSettings,
) -> Trial:
    """The trial with the mean of the `scores` of its `planned` runs; without an objective if one has none.

    Raises:
        MifoError: a score of the objective was not measured, as leakage where there is one instance.
    """
    if len(scores) < planned:
        return Trial(label, number, values, {}, None)
    measured_in_all = [key for key in scores[0] if all(key in each for each in scores)]
    means = {key: math.fsum(each[key] for each in scores) / len(scores) for key in measured_in_all}
    if lost := settings.objective.keys() - means.keys():
        raise MifoError(
            f"tune.objective: {min(lost)} was not measured in every run of '{label}'; take "
            f"other tune.scenes, or some of {', '.join(means)}"
        )
    objective = sum(factor * means[key] for key, factor in settings.objective.items())
    return Trial(label, number, values, means, objective)


def best_trials(trials: Sequence[Trial]) -> dict[str, Trial]:
    """The trial of the largest objective of each method, the earliest of equals."""
    found = [(trial.objective, trial) for trial in trials if trial.objective is not None]
    return {
        label: max((pair for pair in found if pair[1].method == label), key=itemgetter(0))[1]
        for label in dict.fromkeys(trial.method for _, trial in found)
    }


def write_tuning(
    folder: Path, settings: TuningSettings, trials: Sequence[Trial], made: Sequence[tuple[Run, Entry]]
) -> None:
    """Write `trials.csv`, `chosen.yaml` and the record of the runs."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "method": trial.method,
            "trial": trial.number,
            "objective": trial.objective,
            "values": " ".join(trial.overrides),
            **trial.scores,
        }
        for trial in trials
    ]
    write_csv(folder / "trials.csv", pd.DataFrame(rows), digits=5)
    chosen: dict[str, Any] = {
        label: [*settings.methods[label].overrides, *trial.overrides]
        for label, trial in best_trials(trials).items()
    }
    tried = len({trial.number for trial in trials})
    head = f"# {settings.title}: the best of {tried} trials of each method, as rows of a table\n"
    # interpolations are for the runs to resolve
    text = OmegaConf.to_yaml(OmegaConf.create({"rows": chosen}))
    write_whole(folder / "chosen.yaml", head + text)
    write_record(folder, made)
