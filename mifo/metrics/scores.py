"""Scores that know how they were measured: the one reader of their file, and tables that refuse to mix them.

It imports no torch, so that a list of runs starts at once.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mifo.errors import MifoError
from mifo.files import as_record, read_json, write_whole

SCORES = "scores.json"  # what `Evaluation.save` writes in the folder of a run

SHARE, COSINE = (0.0, 1.0), (-1.0, 1.0)
RANGES = {
    "editability": COSINE,
    "instance_consistency": COSINE,
    "instance_consistency_clip": COSINE,
    "identification": SHARE,
    "leakage": SHARE,
    "class_accuracy": SHARE,
    "class_accuracy_whole": SHARE,
    "box_adherence": SHARE,
    "missing": SHARE,
    "twice": SHARE,
    "picture_similarity": COSINE,
}
"""The lowest and the highest value of each metric of `mifo.metrics.evaluation.METRICS`."""


@dataclass(frozen=True)
class Evaluator:
    """Who measured: the model's name and the first 12 hexadecimal digits of the SHA-256 of its weights."""

    name: str
    weights: str

    def __str__(self) -> str:
        return f"{self.name}@{self.weights}"


@dataclass(frozen=True)
class Score:
    """One figure; `count` is the number of pictures or crops behind it."""

    metric: str
    value: float
    higher_is_better: bool
    evaluator: Evaluator
    protocol: str
    count: int = 1

    @property
    def arrow(self) -> str:
        return "↑" if self.higher_is_better else "↓"


def check_value(metric: str, value: float) -> None:
    """Raise ValueError for a value outside of the range that a metric has, but for rounding."""
    low, high = RANGES[metric]
    if not low - 1e-3 <= value <= high + 1e-3:  # NaN is not
        raise ValueError(f"{value} is not in [{low:g}, {high:g}]")


@dataclass(frozen=True)
class Evaluation:
    """Mean `scores`, the scores of each picture by metric, and the mean leakage matrix.

    Row i of the N × N matrix belongs to crops that should show instance i; None where there were none.
    `warnings` say what was not measured, such as the end of a long prompt.
    """

    scores: tuple[Score, ...]
    pictures: tuple[dict[str, float], ...]
    leakage_matrix: tuple[tuple[float | None, ...], ...] = ()
    warnings: tuple[str, ...] = ()

    def save(self, path: Path | str) -> None:
        """Write everything as JSON, whole or not at all; replaces unfinished files, but no scores.

        Raises:
            MifoError: there are scores already, or a score is not finite.
        """
        if has_scores(path):
            raise MifoError(f"{path} already exists: choose another output folder.")
        try:
            content = asdict(self) | {"checksum": _checksum(asdict(self))}
        except ValueError as error:
            raise MifoError(f"a score is not finite, so that {path} is not written") from error
        write_whole(Path(path), json.dumps(content, indent=2))

    @classmethod
    def read(cls, path: Path | str) -> "Evaluation":
        """The evaluation in a file of `save`; refuses damage, unknown metrics and values out of range."""
        content = read_json(Path(path))
        # older files have no checksum
        checksum = content.pop("checksum", None) if isinstance(content, dict) else None
        found = as_record(content, cls, Path(path))
        if unknown := {score.metric for score in found.scores}.union(*found.pictures) - RANGES.keys():
            raise MifoError(f"{path} is damaged: {min(unknown)[:40]!r} is no metric")
        if any(len(row) != len(found.leakage_matrix) for row in found.leakage_matrix):
            raise MifoError(f"{path} is damaged: its leakage matrix is not square")
        values = [(score.metric, score.value) for score in found.scores]
        values += [each for row in found.pictures for each in row.items()]
        values += [("leakage", share) for row in found.leakage_matrix for share in row if share is not None]
        for metric, value in values:
            try:
                check_value(metric, value)
            except ValueError as error:
                raise MifoError(f"{path} is damaged: {metric}={error}") from error
        if checksum not in (None, _checksum(content)):
            raise MifoError(f"{path} is damaged: its checksum is another")
        return found


def _checksum(content: Any) -> str:
    """The first hexadecimals of the SHA-256 of JSON; a ValueError where it holds NaN or infinity."""
    return hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()[:12]


def has_scores(path: Path | str) -> bool:
    """Whether `path` holds scores; a damaged file counts as none."""
    try:
        Evaluation.read(path)
    except MifoError:
        return False
    return True


def score_table(rows: Mapping[str, Sequence[Score]]) -> dict[str, dict[str, float]]:
    """Return {row label: {metric: value}}.

    Raises MifoError when one metric was measured by different evaluators or protocols in different rows: such
    figures do not compare.
    """
    first: dict[str, tuple[str, Score]] = {}
    for label, scores in rows.items():
        for score in scores:
            other_label, other = first.setdefault(score.metric, (label, score))
            if (score.evaluator, score.protocol) != (other.evaluator, other.protocol):
                raise MifoError(
                    f"{score.metric} of '{label}' was measured by {score.evaluator} ({score.protocol}) and "
                    f"that of '{other_label}' by {other.evaluator} ({other.protocol}): evaluate both with "
                    "the same `metrics` before putting them into one table."
                )
    return {label: {score.metric: score.value for score in scores} for label, scores in rows.items()}
