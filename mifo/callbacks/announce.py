"""One line at the start of a stage: what is active."""

import logging
from collections.abc import Sequence

from lightning import Callback, Trainer

from mifo.backbones.unet.layers import attention_layers, choose_layers
from mifo.method.losses.active import active_term, layers_read
from mifo.method.losses.settings import AttentionTerm
from mifo.training.stages import LearningStage

log = logging.getLogger(__name__)


class Announce(Callback):
    """Says which losses are active, on which cross-attention layers, with how many masks, and what learns."""

    def on_fit_start(self, trainer: Trainer, pl_module: LearningStage) -> None:
        log.info(describe(pl_module))


def describe(module: LearningStage) -> str:
    """Describe a stage in one line."""
    steps, penalty = module.settings.steps, module.penalty
    change = penalty.warmup_steps if module.stage == "semantic" else 0
    spans = (
        [(0, f"before step {change}"), (change, f"from step {change}")] if 0 < change < steps else [(0, "")]
    )
    choice = choose_layers(module.unet)
    cross = {layer.index: layer.cross_index for layer in attention_layers(module.unet)}
    losses = ["denoising in the masks"]
    if module.prior_weight:
        losses.append(f"prior × {module.prior_weight:g}")
    for start, when in spans:
        term = active_term(penalty, module.stage, start)
        if term.term is not AttentionTerm.none:
            layers = layers_read(term.term, module.stage, choice)
            where = f"on cross layers {ranges([cross[layer] for layer in layers])}"
            losses.append(f"{term.term} × {term.weight:g} {where} {when}".rstrip())
    learned = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return (
        f"{module.stage}: {steps} steps; {len(module.instances.tokens)} masks; {', '.join(losses)}; attention"
        f" counts below timestep {penalty.timestep_limit}; {learned:,} parameters learn"
        f" ({module.settings.learn})"
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
