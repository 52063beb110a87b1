"""The record of a table: what every run scored, kept beside the table when the runs' own folders are gone."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mifo.errors import MifoError
from mifo.metrics.evaluation import METRICS
from mifo.metrics.scores import Evaluator, Score
from mifo.tables.plan import CodeVersion, Run
from mifo.tables.settings import FILE

RUNS, EVALUATORS = "runs.csv", "evaluators.json"


@dataclass(frozen=True)
class Entry:
    """One run in a record.

    Attributes:
        name: of the folder in which it was made, its configuration's hash first.
        about: "seconds" that it took, and the fields of `CodeVersion`; None where nobody knows.
    """

    name: str
    scores: tuple[Score, ...]
    about: dict[str, Any] | None

    @property
    def minutes(self) -> float:
        return (self.about or {}).get("seconds", 0) / 60

    @property
    def code(self) -> CodeVersion | None:
        return CodeVersion.from_record(self.about) if self.about else None


def write_record(folder: Path, entries: Sequence[tuple[Run, Entry]]) -> None:
    """Write `runs.csv`, a row for each run, and `evaluators.json`, who measured each metric in them all."""
    found = {score.metric: score for _, entry in entries for score in entry.scores}
    metrics = [metric for metric in METRICS if metric in found]
    with open(folder / RUNS, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["row", "scenes", "instances", "seed", *metrics, "minutes", "code", "dirty", "folder"]
        )
        for run, entry in entries:
            values = {score.metric: f"{score.value:.6f}" for score in entry.scores}
            code = entry.code
            about = [round(entry.minutes, 2), code and (code.commit or code.digest), code and code.dirty]
            own = [values.get(metric, "") for metric in metrics]
            writer.writerow([run.row, run.scenes, run.instances, run.seed, *own, *about, entry.name])
    measured = {
        metric: {"evaluator": asdict(found[metric].evaluator), "protocol": found[metric].protocol}
        for metric in metrics
    }
    (folder / EVALUATORS).write_text(json.dumps(measured, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Entry]:
    """The runs of a record by the hash of their configuration.

    Raises:
        MifoError: the folder holds no record, or one that cannot be read.
    """
    try:
        measured = json.loads((folder / EVALUATORS).read_text())
        with open(folder / RUNS, newline="") as file:
            return {row["folder"].partition("-")[0]: _entry(row, measured) for row in csv.DictReader(file)}
    except FileNotFoundError as error:
        raise MifoError(
            f"{folder} holds no record of a table: its {Path(error.filename).name} is not there; name a "
            f"folder that results were written to, not the one of {FILE}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MifoError(f"the record in {folder} cannot be read: {type(error).__name__}: {error}") from error


def _entry(row: dict[str, str], measured: dict[str, Any]) -> Entry:
    scores = tuple(
        Score(
            metric,
            float(row[metric]),
            METRICS[metric].higher_is_better,
            Evaluator(**by["evaluator"]),
            by["protocol"],
        )
        for metric, by in measured.items()
        if row[metric]
    )
    digest = row["folder"].partition("-")[2]
    about = {"seconds": 60 * float(row["minutes"]), "digest": digest} if row["code"] else None
    if about and row["code"] != digest:
        about |= {"commit": row["code"], "dirty": row["dirty"] == "True"}
    return Entry(row["folder"], scores, about)
