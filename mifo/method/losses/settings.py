"""Which attention loss is active, with which weight and when."""

from dataclasses import dataclass, field
from enum import StrEnum


class AttentionTerm(StrEnum):
    """The attention losses that a term of the settings can name."""

    none = "none"
    reward = "reward"
    penalty = "penalty"
    break_a_scene = "break_a_scene"


@dataclass
class TermSettings:
    """One attention loss and its weight in the total loss."""

    term: AttentionTerm
    weight: float


@dataclass
class PenaltySettings:
    """Attention losses of both stages; the defaults are MIFO's (arXiv 2511.00542).

    Semantic learning uses `warmup` in its first `warmup_steps` steps and `semantic` from then on;
    fine-tuning uses `finetuning` throughout. A sample counts only if its timestep is below `timestep_limit`.
    """

    warmup: TermSettings = field(default_factory=lambda: TermSettings(AttentionTerm.reward, 1e-2))
    warmup_steps: int = 200
    semantic: TermSettings = field(default_factory=lambda: TermSettings(AttentionTerm.penalty, 2e-2))
    finetuning: TermSettings = field(default_factory=lambda: TermSettings(AttentionTerm.penalty, 2e-2))
    timestep_limit: int = 500
