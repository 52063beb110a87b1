"""Which terms of the attention loss are active at a step, with which weight."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from mifo.errors import MifoError, check_least
from mifo.method.backbone import Backbone, Site, Stage
from mifo.method.losses.attention_loss import AttentionLoss, Maps, Masks, find_loss
from mifo.method.losses.settings import PenaltySettings, Ramp, TermSettings, TermStage


@dataclass(frozen=True, eq=False)
class Term:
    """A term with its loss and the sites that it reads on a model; two terms are never equal."""

    name: str
    loss: AttentionLoss
    sites: tuple[Site, ...]
    settings: TermSettings


class Timeline:
    """The terms of one stage on one model."""

    def __init__(self, settings: PenaltySettings, stage: Stage, steps: int, backbone: Backbone) -> None:
        self._steps = steps
        self._terms = [
            Term(name, loss, _sites(name, each, loss, stage, backbone), each)
            for name, each in settings.terms.items()
            if each.stage in (stage, TermStage.both)
            for loss in [find_loss(each.loss)]
        ]

    def active(self, step: int) -> tuple[Term, ...]:
        """The terms that count at a step, which is counted from 0 within its stage."""
        return tuple(
            term
            for term in self._terms
            if term.settings.from_step <= step < self._end(term.settings)
            and (term.settings.weight or term.settings.ramp is not Ramp.constant)
        )

    def weight(self, term: Term, step: int) -> float:
        """The factor of a term at a step: constant, or between both ends on a line or half a cosine."""
        settings = term.settings
        if settings.ramp is Ramp.constant or settings.weight_end is None:
            return settings.weight
        done = (step - settings.from_step) / max(1, self._end(settings) - settings.from_step - 1)
        if settings.ramp is Ramp.cosine:
            done = (1 - math.cos(math.pi * done)) / 2
        return settings.weight + (settings.weight_end - settings.weight) * done

    def spans(self) -> list[tuple[int, int, tuple[Term, ...]]]:
        """First step, step after the last, and the active terms, wherever the set of active terms changes."""
        edges = {0, self._steps}
        for term in self._terms:
            edges |= {min(term.settings.from_step, self._steps), self._end(term.settings)}
        return [(first, last, self.active(first)) for first, last in pairwise(sorted(edges))]

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites that the stage may read, in order of execution."""
        return _ordered(site for term in self._terms for site in term.sites)

    def _end(self, settings: TermSettings) -> int:
        return self._steps if settings.to_step is None else min(settings.to_step, self._steps)


def attention_loss(
    terms: Sequence[Term],
    weights: Sequence[Tensor] | Tensor,
    maps: Maps,
    masks: Masks,
    valid: Tensor,
    share: Tensor,
) -> Tensor:
    """The weighted sum of the terms: each summed over sites and instances, mean over samples; a scalar.

    Args:
        weights: (terms,), one factor a term; a tensor, so that a captured step reads it anew.
        maps, masks: of all sites that some term reads.
        valid: (B, K), 1 for an instance that counts and 0 for padding.
        share: time of each sample as a share of the whole, (B,) in [0, 1].
    """
    total = valid.new_zeros(())
    for term, weight in zip(terms, weights, strict=True):
        losses = term.loss({site: maps[site] for site in term.sites}, masks)
        gate = (share < term.settings.time_below).float()
        total = total + weight * (losses * valid * gate[:, None]).sum(1).mean()
    return total


def check_penalty(settings: PenaltySettings) -> None:
    """Refuse impossible terms before any model is loaded; their sites are checked with the model."""
    for name, term in settings.terms.items():
        key = f"penalty.terms.{name}"
        find_loss(term.loss)
        ends = {name: 0 for name in ("to_step", "weight_end") if getattr(term, name) is not None}
        check_least(key, term, weight=0, from_step=0, **ends)
        if not 0 <= term.time_below <= 1:
            raise MifoError(f"{key}.time_below={term.time_below} is no share of the time; take 0 to 1.")
        if (term.ramp is Ramp.constant) != (term.weight_end is None):
            raise MifoError(
                f"{key}.ramp={term.ramp} and weight_end belong together; give ramp=linear or cosine with "
                "weight_end."
            )
        if term.sites is not None and not term.sites:
            raise MifoError(f"{key}.sites is empty; name at least one site, or null for the loss's own.")


def _sites(
    name: str, settings: TermSettings, loss: AttentionLoss, stage: Stage, backbone: Backbone
) -> tuple[Site, ...]:
    if settings.sites is None:
        return loss.sites(stage, backbone.default_sites)
    words = [site for site in backbone.sites if site.kind == "words"]
    chosen = []
    for wanted in settings.sites:
        fitting = [site for site in words if wanted in (site.name, str(site.size[0]))]
        if not fitting:
            raise MifoError(
                f"penalty.terms.{name}.sites names {wanted}, which the model does not have; take sizes "
                f"({', '.join(sorted({str(site.size[0]) for site in words}, key=int))}) or names such as "
                f"{words[0].name}"
            )
        chosen += fitting
    return _ordered(chosen)


def _ordered(sites: Iterable[Site]) -> tuple[Site, ...]:
    return tuple(sorted(set(sites), key=lambda site: site.index))
