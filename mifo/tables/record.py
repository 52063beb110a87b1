"""The record of a table: what every run scored, kept beside the table when the runs' own folders are gone."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from mifo.config.identity import CodeVersion
from mifo.errors import MifoError
from mifo.files import as_record, finite_number, read_csv, read_json, write_whole
from mifo.metrics.evaluation import METRICS
from mifo.metrics.scores import Evaluator, Score, check_value
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
    """Write `runs.csv`, a row for each run, and `evaluators.json`, who measured each metric in all runs.

    Each row has a checksum of what is read of it again, with the evaluators.
    """
    found = {score.metric: score for _, entry in entries for score in entry.scores}
    metrics = [metric for metric in METRICS if metric in found]
    rows = []
    for run, entry in entries:
        values = {score.metric: score.value for score in entry.scores}
        code = entry.code
        about = [str(round(entry.minutes, 2)), code and (code.commit or code.digest), code and code.dirty]
        own = [values.get(metric) for metric in metrics]
        place = [run.row, run.scenes, run.instances, run.seed]
        rows.append([*place, *own, *about, entry.name, _checksum(entry)])
    heads = ["row", "scenes", "instances", "seed", *metrics, "minutes", "code", "dirty", "folder", "checksum"]
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
    columns: dict[str, Callable[[str], Any]] = {metric: partial(_score, metric) for metric in measures}
    columns |= {
        "minutes": _minutes,
        "code": partial(_fitting, r"[0-9a-f]*", "no version of the code"),
        "dirty": lambda text: _fitting("|True|False", "neither True nor False", text) == "True",
        "folder": partial(_fitting, r"[0-9a-f]{12}-[0-9a-f]{12}", "no name of a run's folder"),
    }
    entries: dict[str, Entry] = {}
    for line, row in enumerate(read_csv(path, columns), start=2):
        entry = _entry(row, measures)
        # older records have no checksums
        if row.get("checksum", own := _checksum(entry)) != own:
            raise MifoError(f"{path} is damaged: line {line} or {EVALUATORS} is not what was written")
        # two rows of a table may be one run
        if entries.setdefault(entry.name.partition("-")[0], entry) != entry:
            raise MifoError(f"{path} is damaged: it says two things of the run {entry.name[:40]}")
    return entries


def _measures(path: Path) -> dict[str, Measure]:
    content = read_json(path)
    if not isinstance(content, dict) or not content or content.keys() - METRICS.keys():
        raise MifoError(f"{path} is damaged: its keys must be metrics: {', '.join(METRICS)}")
    return {metric: as_record(by, Measure, path) for metric, by in content.items()}


def _entry(row: dict[str, Any], measures: dict[str, Measure]) -> Entry:
    scores = tuple(
        Score(metric, row[metric], METRICS[metric].higher_is_better, by.evaluator, by.protocol)
        for metric, by in measures.items()
        if row[metric] is not None
    )
    digest = row["folder"].partition("-")[2]
    about = None
    if row["code"]:
        commit = None if row["code"] == digest else row["code"]
        about = About(digest, commit, row["dirty"] if commit else None, 60 * row["minutes"])
    return Entry(row["folder"], scores, about)


def _checksum(entry: Entry) -> str:
    """The first hexadecimals of the SHA-256 of what a row says of a run, as far as it is written out."""
    scores = sorted(
        (each.metric, f"{each.value:.6f}", str(each.evaluator), each.protocol) for each in entry.scores
    )
    code = entry.code and (entry.code.commit or entry.code.digest, bool(entry.code.dirty))
    return hashlib.sha256(repr((entry.name, scores, code, round(entry.minutes, 2))).encode()).hexdigest()[:12]


# what makes values of the texts in a row


def _score(metric: str, text: str) -> float | None:
    if not text:
        return None
    check_value(metric, value := finite_number(text))
    return value


def _minutes(text: str) -> float:
    if (number := finite_number(text)) < 0:
        raise ValueError(f"{text[:40]!r} is no duration")
    return number


def _fitting(pattern: str, other: str, text: str) -> str:
    """A text that fits a pattern; `other` says what another one is."""
    if not re.fullmatch(pattern, text):
        raise ValueError(f"{text[:40]!r} is {other}")
    return text
