"""The loss of latent guidance on the attention of one forward pass.

Bounded Guidance of Bounded Attention (arXiv 2403.16990) with MIFO's penalty on the background (2511.00542).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mifo.method.guidance.settings import GuidanceSettings


def attention_sums(probabilities: Tensor, shapes: Tensor, context: Tensor) -> Tensor:
    """Attention F, B of fore- and background to each subject's context, summed over heads, pixels, tokens.

    Args:
        probabilities: (B, heads, n, keys).
        shapes: bool (B or 1, S, n): the pixels of each subject; the background is what no subject has.
        context: bool (B or 1, S, keys): the keys of each subject's context.

    Returns:
        (2, B, S): F from the subject's pixels, B from the background.
    """
    attention = probabilities.sum(dim=1) @ context.mT.to(probabilities.dtype)  # (B, n, S)
    background = ~shapes.any(dim=1, keepdim=True)
    return torch.stack([(attention.mT * pixels).sum(dim=-1) for pixels in (shapes, background)])


def guidance_term(sums: Sequence[Tensor], alpha: float | Tensor) -> Tensor:
    """(1 − F/(F + B))² + α·log(1 + B), of shape (B, S).

    F and B are averaged over layers before the ratio: a small box can be empty at the smallest resolution.

    Args:
        sums: one (2, B, S) for each layer, see `attention_sums`.
    """
    foreground, background = torch.stack(list(sums)).mean(dim=0)
    # A box too small for every layer, in a picture without background, gives 0/0; no gradient can help it.
    missed: Tensor = 1 - foreground / (foreground + background).clamp(min=1e-8)
    return missed**2 + alpha * torch.log1p(background)


def guidance_loss(
    cross_sums: Sequence[Tensor],
    self_sums: Sequence[Tensor],
    alphas: Sequence[float] | Tensor,
    settings: GuidanceSettings,
) -> Tensor:
    """L = Σ_B Σ_S (1.5·cross term + 0.5·self term).

    Args:
        cross_sums, self_sums: one (2, B, S) for each layer of the kind; a kind without layers adds nothing.
        alphas: of the cross term and of the self term, see `penalty_weight`.
    """
    kinds = ((cross_sums, settings.cross_weight), (self_sums, settings.self_weight))
    terms = [
        weight * guidance_term(sums, alpha)
        for (sums, weight), alpha in zip(kinds, alphas, strict=True)
        if sums
    ]
    return torch.stack(terms).sum()
