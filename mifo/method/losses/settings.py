"""Which losses on attention there are, with which weight and when."""

from dataclasses import dataclass, field
from enum import StrEnum


class TermStage(StrEnum):
    """The stage in which a term counts."""

    semantic = "semantic"
    finetuning = "finetuning"
    both = "both"


class Ramp(StrEnum):
    """How a weight goes from `weight` to `weight_end` between the term's first and last step."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass
class TermSettings:
    """One term of the attention loss. It counts at steps from_step ≤ step < to_step of its stage, from 0."""

    loss: str  # a file of `mifo/method/losses`, such as reward, or the dotted path of an `AttentionLoss`
    weight: float  # factor of the loss in the total; at `from_step` if there is a ramp
    stage: TermStage = TermStage.both
    from_step: int = 0
    to_step: int | None = None  # None: the term counts to the end of the stage
    time_below: float = 1.0  # only samples count whose time (t / T, on a flow σ) is below this share
    ramp: Ramp = Ramp.constant
    weight_end: float | None = None  # factor at the term's last step, with a ramp that is not constant
    sites: list[str] | None = None  # names of sites, or sizes such as "16" for 16×16; None: the loss's own


@dataclass
class PenaltySettings:
    """The terms of the attention loss by name; several may be active at once, and none is a valid choice.

    The options of `conf/penalty` name their terms and refer to the other three values, so that a model's
    settings or a sweep change them for every option alike.
    """

    terms: dict[str, TermSettings] = field(default_factory=dict)
    reward_weight: float = 1e-2
    reward_steps: int = 200
    time_below: float = 0.5
