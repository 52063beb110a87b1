"""The loss of both stages of learning: denoising in the masks, prior preservation and attention losses.

B instance samples, P class samples (they come first; P = B, or 0 without a prior), K selected instances,
L tokens, C × h × w latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mifo.method.backbone import Backbone, Conditioning, Read, Site
from mifo.method.losses.timeline import Term, attention_loss


class StepInputs(NamedTuple):
    """The tensors of one learning step. Masks are in [0, 1] and may overlap."""

    latents: Tensor  # (P + B, C, h, w)
    noise: Tensor  # (P + B, C, h, w)
    times: Tensor  # (P + B,)
    word_positions: Tensor  # place in the conditioning sequence of each selected instance's word, (B, K)
    masks: dict[tuple[int, int], Tensor]  # of the selected instances, (B, K, *size) by size
    latent_masks: Tensor  # the same at the size of the latents, by their nearest pixel, (B, K, h, w)
    valid: Tensor  # (B, K), 1 for a selected instance, 0 for padding, whose other entries do not matter


@dataclass(frozen=True)
class LossParts:
    """A loss, the weighted parts that add up to it (scalars), and the attention maps behind it."""

    total: Tensor
    denoising: Tensor  # on the instance samples, inside the union of their masks
    prior: Tensor  # on the class samples; 0 without class samples
    attention: Tensor  # sum of the active terms; a term is 0 for samples whose time is not below its limit
    maps: dict[Site, Tensor]  # the instances' attention maps by site, (B, K, h, w), detached


def learning_loss(
    backbone: Backbone,
    conditioning: Conditioning,
    inputs: StepInputs,
    terms: Sequence[Term],
    weights: Tensor,
    prior_weight: float = 0.0,
) -> LossParts:
    """Masked denoising, attention losses and prior preservation (MIFO, arXiv 2511.00542).

    Stage 1 has no class samples. Attention losses are gated by the times of the instance samples alone.

    Args:
        conditioning: of the prompts of all P + B samples.
        terms: those active at this step. weights: their factors, (terms,).
        prior_weight: of the denoising loss on the class samples (DreamBooth, arXiv 2208.12242, eq. 2).
    """
    process = backbone.process
    noisy = process.add_noise(inputs.latents, inputs.noise, inputs.times)
    read = word_maps(inputs.word_positions)
    reads = {site: read for term in terms for site in term.sites}
    prediction, maps = backbone.predict(noisy, inputs.times, conditioning, reads)
    # (B, K, h, w)
    maps = {site: flat.transpose(1, 2).reshape(len(flat), -1, *site.size) for site, flat in maps.items()}
    target = process.target(inputs.latents, inputs.noise, inputs.times)

    classes = len(inputs.latents) - len(inputs.word_positions)
    union = (inputs.latent_masks * inputs.valid[:, :, None, None]).amax(1, keepdim=True)
    denoising = denoising_loss(prediction[classes:], target[classes:], union)
    prior = denoising.new_zeros(())
    if classes:
        prior = prior_weight * denoising_loss(prediction[:classes], target[:classes])
    share = process.share(inputs.times[classes:])
    attended = attention_loss(terms, weights, maps, inputs.masks, inputs.valid, share)
    total = denoising + prior + attended
    return LossParts(total, denoising, prior, attended, {site: each.detach() for site, each in maps.items()})


def denoising_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """MSE(ε̂·U, ε·U), the mean over all elements, inside and outside the mask U (arXiv 2305.16311, eq. 1).

    Args:
        prediction, target: (B, C, h, w); compared in 32 bits.
        mask: (B, 1, h, w) in [0, 1], or `None` for the plain loss.
    """
    error = prediction.float() - target.float()
    return torch.mean((error if mask is None else error * mask).square())


def word_maps(positions: Tensor) -> Read:
    """Reads the maps of the words at `positions` (B, K) of the last B rows: (B, n, K), mean over heads."""
    rows, words = positions.shape

    def read(probabilities: Tensor) -> Tensor:
        index = positions[:, None, None, :].expand(-1, *probabilities.shape[1:3], words)
        return torch.gather(probabilities[-rows:], -1, index).mean(1)

    return read
