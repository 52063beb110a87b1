"""The record of a table: what every run scored, kept beside the table when the runs' own folders are gone."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from math import isfinite
from pathlib import Path

import pandas as pd

from mifo.config.identity import CodeVersion
from mifo.errors import MifoError
from mifo.files import as_record, read_json, read_text, write_whole
from mifo.metrics.evaluation import METRICS
from mifo.metrics.scores import Evaluator, Score
from mifo.report.tables import write_csv
from mifo.tables.plan import Run
from mifo.tables.settings import FILE

RUNS, EVALUATORS = "runs.csv", "evaluators.json"


@dataclass(frozen=True)
class About:
    """How a run was made: the fields of `CodeVersion`, how long it took, and what would be typed for it."""

    digest: str
    commit: str | None = None
    dirty: bool | None = None
    seconds: float = 0.0
    overrides: list[str] = field(default_factory=list)

    @property
    def code(self) -> CodeVersion:
        """Older records without a commit say that nothing was changed, which nobody knows."""
        dirty = None if self.commit is None and not self.dirty else self.dirty
        return CodeVersion(self.digest, self.commit, dirty)


@dataclass(frozen=True)
class Entry:
    """One run in a record.

    Attributes:
        name: of the folder in which it was made, its configuration's hash first.
        about: None where nobody knows.
    """

    name: str
    scores: tuple[Score, ...]
    about: About | None

    @property
    def minutes(self) -> float:
        return self.about.seconds / 60 if self.about else 0.0

    @property
    def code(self) -> CodeVersion | None:
        return self.about.code if self.about else None


@dataclass(frozen=True)
class Measure:
    """Who measured a metric, and by which protocol."""

    evaluator: Evaluator
    protocol: str


def write_record(folder: Path, entries: Sequence[tuple[Run, Entry]]) -> None:
    """Write `runs.csv`, a row for each run, and `evaluators.json`, who measured each metric in them all."""
    found = {score.metric: score for _, entry in entries for score in entry.scores}
    metrics = [metric for metric in METRICS if metric in found]
    rows = []
    for run, entry in entries:
        values = {score.metric: score.value for score in entry.scores}
        code = entry.code
        about = [str(round(entry.minutes, 2)), code and (code.commit or code.digest), code and code.dirty]
        own = [values.get(metric) for metric in metrics]
        rows.append([run.row, run.scenes, run.instances, run.seed, *own, *about, entry.name])
    heads = ["row", "scenes", "instances", "seed", *metrics, "minutes", "code", "dirty", "folder"]
    write_csv(folder / RUNS, pd.DataFrame(rows, columns=heads), digits=6)
    measured = {
        metric: asdict(Measure(found[metric].evaluator, found[metric].protocol)) for metric in metrics
    }
    write_whole(folder / EVALUATORS, json.dumps(measured, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Entry]:
    """The runs of a record by the hash of their configuration.

    Raises:
        MifoError: the folder holds no record, or one that cannot be read.
    """
    for name in (EVALUATORS, RUNS):
        if not (folder / name).exists():
            raise MifoError(
                f"{folder} holds no record of a table: its {name} is not there; name a folder that results "
                f"were written to, not the one of {FILE}"
            )
    path = folder / RUNS
    measures = _measures(folder / EVALUATORS)
    rows = _rows(path, [*measures, "minutes", "code", "dirty", "folder"])
    entries: dict[str, Entry] = {}
    for row in rows:
        entry = _entry(row, measures, path)
        # two rows of a table may be one run
        if entries.setdefault(entry.name.partition("-")[0], entry) != entry:
            raise MifoError(f"{path} is damaged: it says two things of the run {entry.name[:40]}")
    return entries


def _measures(path: Path) -> dict[str, Measure]:
    content = read_json(path)
    if not isinstance(content, dict) or not content or content.keys() - METRICS.keys():
        raise MifoError(f"{path} is damaged: its keys must be metrics: {', '.join(METRICS)}")
    return {metric: as_record(by, Measure, path) for metric, by in content.items()}


def _rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file as texts, which must have the columns `needed`."""
    text = read_text(path)
    try:
        # pandas fills up rows that were cut off, and takes a quote that nobody closes
        heads, *rows = csv.reader(StringIO(text, newline=""), strict=True)
    except (csv.Error, ValueError) as error:
        raise MifoError(f"{path} is damaged: it is no table ({error})") from error
    if missing := [column for column in needed if column not in heads]:
        raise MifoError(f"{path} is damaged: it lacks the column {missing[0]}")
    if not text.endswith("\n") or any(len(row) != len(heads) for row in rows):
        raise MifoError(f"{path} is damaged: a row has more or fewer fields than the first line")
    return [dict(zip(heads, row, strict=True)) for row in rows]


def _entry(row: dict[str, str], measures: dict[str, Measure], path: Path) -> Entry:
    scores = tuple(
        Score(
            *(metric, _number(row[metric], path), METRICS[metric].higher_is_better),
            *(by.evaluator, by.protocol),
        )
        for metric, by in measures.items()
        if row[metric]
    )
    if not re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]{12}", row["folder"]):
        raise MifoError(f"{path} is damaged: {row['folder'][:40]!r} is no name of a run's folder")
    digest = row["folder"].partition("-")[2]
    about = None
    if row["code"]:
        commit = None if row["code"] == digest else row["code"]
        dirty = row["dirty"] == "True" if commit else None
        about = About(digest, commit, dirty, 60 * _number(row["minutes"], path))
    return Entry(row["folder"], scores, about)


def _number(text: str, path: Path) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise MifoError(f"{path} is damaged: {text[:40]!r} is no number")
    return number
