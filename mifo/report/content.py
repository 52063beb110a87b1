"""What a contact sheet shows."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mifo.data.saved_pictures import Picture
from mifo.metrics.scores import Evaluation, Score

LABELS = {
    "editability": "Editability",
    "instance_consistency": "Instance-consistency",
    "instance_consistency_clip": "Instance-consistency (CLIP)",
    "identification": "Identification",
    "leakage": "Leakage",
    "class_accuracy": "Class accuracy",
    "class_accuracy_whole": "Class accuracy, whole things",
    "box_adherence": "Box adherence",
    "missing": "Missing",
    "twice": "Twice",
    "picture_similarity": "Picture similarity (CLIP-I)",
}
EXPLANATIONS = {
    "editability": "the picture says what its prompt says",
    "instance_consistency": "each box shows its own instance",
    "instance_consistency_clip": "the same, seen by CLIP",
    "identification": "boxes recognised as their own instance",
    "leakage": "share of other instances in a box",
    "class_accuracy": "boxes still show their instance's class",
    "class_accuracy_whole": "the same, where things leave their boxes",
    "box_adherence": "instances found where their boxes are",
    "missing": "pictures in which an instance is in no box",
    "twice": "pictures in which an instance is in two boxes",
    "picture_similarity": "the whole picture resembles the instances",
}


@dataclass(frozen=True)
class Sheet:
    """The content: where the instances come from, the made pictures and what was measured.

    `source` is (3, H, W), float in [0, 1] or uint8; `masks` (N, H, W) in [0, 1]; `facts` are shown under the
    title (model, method, seed); `evaluation` holds one row of scores per picture, in the same order.
    """

    title: str
    source: Tensor
    masks: Tensor
    tokens: Sequence[str]
    class_names: Sequence[str | None]
    pictures: Sequence[Picture]
    evaluation: Evaluation | None
    facts: dict[str, str]

    def scores_of(self, index: int) -> dict[str, float]:
        """Scores of picture `index`, by metric."""
        return self.evaluation.pictures[index] if self.evaluation else {}

    @property
    def scores(self) -> Sequence[Score]:
        return self.evaluation.scores if self.evaluation else ()

    @property
    def few(self) -> bool:
        """Whether the pictures are so few that two to a row look better than three."""
        return len(self.pictures) in (1, 2, 4)

    @property
    def footer(self) -> str:
        """Who measured; figures of other evaluators do not compare."""
        evaluators = dict.fromkeys(str(score.evaluator) for score in self.scores)
        if not evaluators:
            return ""
        return f"Measured by {' and '.join(evaluators)}, protocol {self.scores[0].protocol}"
