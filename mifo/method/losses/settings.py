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
    """One term of the attention loss.

    Attributes:
        loss: a file of `mifo/method/losses`, such as reward, or the dotted path of an `AttentionLoss`.
        weight: factor of the loss in the total; at `from_step` if there is a ramp.
        weight_end: the factor at the term's last step; only with a `ramp` that is not constant.
        from_step, to_step: the term counts at steps from_step ≤ step < to_step of its stage, counted from 0;
            None: to the end.
        time_below: only samples count whose time (t / T, on a flow σ) is below this share.
        sites: names of sites to read, or sizes such as "16" for all of 16×16; None: the loss's own.
    """

    loss: str
    weight: float
    stage: TermStage = TermStage.both
    from_step: int = 0
    to_step: int | None = None
    time_below: float = 1.0
    ramp: Ramp = Ramp.constant
    weight_end: float | None = None
    sites: list[str] | None = None


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
