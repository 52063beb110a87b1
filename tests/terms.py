"""Attention losses for tests: the terms of the options in conf/penalty, and terms made up."""

from typing import Any

from omegaconf import OmegaConf

from mifo.config.location import conf_folder
from mifo.method.losses.settings import PenaltySettings, TermSettings


def penalty(option: str = "mifo", **changes: Any) -> PenaltySettings:
    """The settings of `penalty=option`, with other values of its keys."""
    chosen = OmegaConf.load(conf_folder() / "penalty" / f"{option}.yaml")
    merged = OmegaConf.merge(OmegaConf.structured(PenaltySettings), chosen, changes)
    return OmegaConf.to_object(OmegaConf.create({"penalty": merged}))["penalty"]


def one_term(loss: str, weight: float = 1.0, **options: Any) -> PenaltySettings:
    """A single term, named after its loss; without `options` it counts in both stages at every time."""
    return PenaltySettings({loss: TermSettings(loss, weight, **options)})
