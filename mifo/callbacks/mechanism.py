"""How a loss works: where words attend, and how strong each gradient is, on the same draws each time."""

from collections.abc import Iterator, Sequence

import torch
from lightning import Trainer
from torch import Tensor

from mifo.callbacks.logging import Periodic, log_values
from mifo.data.learning_data import LearningBatch
from mifo.data.mask_pyramid import MaskPyramid
from mifo.method.backbone import Site
from mifo.method.losses.penalty import Penalty
from mifo.method.losses.settings import TermSettings
from mifo.method.losses.timeline import Term
from mifo.method.objective import LossParts, learning_loss
from mifo.training.stages import LearningStage, total_norm


class Mechanism(Periodic):
    """Logs `mechanism/…` every `every` steps and at a stage's end, on the first `draws` draws of the stage.

    Of the words' attention, as shares of the whole map, mean over the stage's default sites, instances and
    draws: `own` inside the instance, `others` inside the other ones that the draw selected, `elsewhere`. Of
    the gradient of what learns: the norms of its parts `denoising`, `prior` and `attention`, mean over draws.
    Both are computed beside the step, without CUDA graphs or rounded weights.
    """

    def __init__(self, every: int = 20, draws: int = 8) -> None:
        super().__init__(every)
        self.draws = draws

    def on_fit_start(self, trainer: Trainer, pl_module: LearningStage) -> None:
        # draws need masks of the sites that are read here, also where no term reads them
        data, model = trainer.datamodule, pl_module.model
        data.sizes = data.sizes | {site.size for site in _sites(pl_module)}
        masks = pl_module.instances.resized(model.image_size)[1].to(pl_module.device)
        data.masks = MaskPyramid.of(masks, data.sizes, model.latent_shape[1:])

    def look(self, trainer: Trainer, module: LearningStage) -> None:
        sites = _sites(module)
        found = [
            torch.stack([*_shares(parts, one, sites), *_norms(module, parts)])
            for one, parts in self._losses(trainer, module)
        ]
        names = ("own", "others", "elsewhere", "denoising", "prior", "attention")
        values = torch.stack(found).mean(0).tolist()
        log_values(trainer, module, "mechanism", dict(zip(names, values, strict=True)))

    def _losses(self, trainer: Trainer, module: LearningStage) -> Iterator[tuple[LearningBatch, LossParts]]:
        """The draws with their losses, whose maps are read also where no term is active."""
        step = min(trainer.global_step, module.settings.steps - 1)
        terms = module.timeline.active(step)
        weights = [module.timeline.weight(term, step) for term in terms]
        factors = torch.tensor([*weights, 0.0], device=module.device)
        reading = Term("reading", Penalty(), _sites(module), TermSettings("penalty", 0.0))
        for draw in range(self.draws):
            batch = trainer.datamodule.draw(draw)
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            said = module.model.encode(batch.ids)
            yield (
                batch,
                learning_loss(
                    module.model, said, batch.inputs, (*terms, reading), factors, module.prior_weight
                ),
            )


def _sites(module: LearningStage) -> tuple[Site, ...]:
    """The sites of the words that losses read in a stage by default."""
    sites: tuple[Site, ...] = getattr(module.model.default_sites, module.stage)
    return sites


def _shares(parts: LossParts, batch: LearningBatch, sites: Sequence[Site]) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of attention in own masks, in masks of others alone, and elsewhere; scalars."""
    valid = batch.inputs.valid
    own, others = [], []
    for site in sites:
        maps = parts.maps[site]
        masks = batch.inputs.masks[site.size] * valid[:, :, None, None]
        beside = (masks.amax(1, keepdim=True) - masks).clamp_min(0)
        whole = maps.sum((-2, -1)).clamp_min(1e-12)
        own.append((maps * masks).sum((-2, -1)) / whole)
        others.append((maps * beside).sum((-2, -1)) / whole)
    inside, near = ((torch.stack(each).mean(0) * valid).sum() / valid.sum() for each in (own, others))
    return inside, near, 1 - inside - near


def _norms(module: LearningStage, parts: LossParts) -> list[Tensor]:
    """The norms of the gradients of denoising, prior and attention; 0 for a part that reaches nothing."""
    learning = [each for each in module.parameters() if each.requires_grad]
    norms = []
    for part in (parts.denoising, parts.prior, parts.attention):
        gradients = (
            torch.autograd.grad(part, learning, retain_graph=True, allow_unused=True)
            if part.requires_grad
            else ()
        )
        known = [each for each in gradients if each is not None]
        norms.append(total_norm(known) if known else part.detach().new_zeros(()))
    return norms
