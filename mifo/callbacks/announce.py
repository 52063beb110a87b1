"""One line at the start of a stage: what is active."""

import logging
from collections.abc import Sequence

from lightning import Callback, Trainer

from mifo.training.stages import LearningStage

log = logging.getLogger(__name__)


class Announce(Callback):
    """Says which losses are active, on which cross-attention layers, with how many masks, and what learns."""

    def on_fit_start(self, trainer: Trainer, pl_module: LearningStage) -> None:
        log.info(describe(pl_module))


def describe(module: LearningStage) -> str:
    """Describe a stage in one line."""
    steps = module.settings.steps
    words = [site for site in module.model.sites if site.kind == "words"]
    losses = ["denoising in the masks"]
    if module.prior_weight:
        losses.append(f"prior × {module.prior_weight:g}")
    for first, last, terms in module.timeline.spans():
        for term in terms:
            when = f"in steps {first} to {last - 1}" if last - first < steps else ""
            where = f"on cross layers {ranges([words.index(site) for site in term.sites])}"
            below = f"at times below {term.settings.time_below:g}" if term.settings.time_below < 1 else ""
            begin, end = (module.timeline.weight(term, step) for step in (first, last - 1))
            loss = term.name if "." in term.settings.loss else term.settings.loss
            weight = f"{loss} × {begin:g}" + (f" to {end:g}" if end != begin else "")
            losses.append(" ".join(part for part in (weight, where, when, below) if part))
    learned = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return (
        f"{module.stage}: {steps} steps; {len(module.instances.tokens)} masks; {', '.join(losses)}; "
        f"{learned:,} parameters learn ({module.settings.trainable})"
    )


def ranges(numbers: Sequence[int]) -> str:
    """Write 7, 8, 9, 12 as "7–9, 12"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
