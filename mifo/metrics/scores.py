"""Scores that know how they were measured, and tables that refuse to mix them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mifo.errors import MifoError


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
