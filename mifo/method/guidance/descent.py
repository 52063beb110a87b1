"""The descent of the latents on the guidance loss, and the weight α of the loss's penalty."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mifo.method.guidance.loss import guidance_loss
from mifo.method.guidance.settings import GuidanceSettings

ReadSums = Callable[[Tensor], tuple[Sequence[Tensor], Sequence[Tensor]]]
Differentiate = Callable[[Tensor, tuple[float, float]], tuple[Tensor, Tensor]]


def penalty_weight(counter: int) -> float:
    """α after `counter` earlier readings, MIFO's schedule (arXiv 2511.00542): a line, then half a cosine.

    With τ = ⌊counter / 10⌋:

        τ ≤ 3:   0.4 + (0.1 − 0.4)·(τ − 1)/2
        τ ≥ 15:  0.01
        else:    0.01 + (0.1 − 0.01)·(1 + cos(π·(τ − 3)/12))/2
    """
    tau = counter // 10
    if tau <= 3:
        return 0.4 + (0.1 - 0.4) * (tau - 1) / 2
    if tau >= 15:
        return 0.01
    return 0.01 + (0.1 - 0.01) * (1 + math.cos(math.pi * (tau - 3) / 12)) / 2


def loss_and_gradient(
    latents: Tensor, read_sums: ReadSums, alphas: Sequence[float] | Tensor, settings: GuidanceSettings
) -> tuple[Tensor, Tensor]:
    """The guidance loss per sample and subject, a scalar, and ∇_z L, (B, C, h, w), both detached.

    Args:
        latents: (B, C, h, w), detached.
        read_sums: runs the network on latents; gives `attention_sums` of the words' and of the pixels' sites.
        alphas: see `guidance_loss`.
    """
    latents = latents.detach().requires_grad_()
    with torch.enable_grad():
        cross_sums, self_sums = read_sums(latents)
        loss = guidance_loss(cross_sums, self_sums, alphas, settings)
    (gradient,) = torch.autograd.grad(loss, latents)
    _, samples, subjects = (cross_sums or self_sums)[0].shape
    return loss.detach() / (samples * subjects), gradient


def descend(
    latents: Tensor, differentiate: Differentiate, step: int, counter: int, settings: GuidanceSettings
) -> tuple[Tensor, Tensor, int]:
    """z ← z − η ∇L, up to `settings.iterations` times (Bounded Attention, arXiv 2403.16990).

    Before an iteration it stops if the previous one of this step gave a loss per sample and subject below
    `settings.threshold`: each step takes at least one, and one that falls below still moves the latents. The
    step size η falls linearly over the guided steps. α is read twice an iteration, once for the cross- and
    once for the self-attention part of the loss.

    Args:
        latents: (B, C, h, w), detached.
        differentiate: `loss_and_gradient` of latents and both α.
        step: the denoising step, from 0.
        counter: readings of α in earlier steps, 0 at the first.

    Returns:
        The guided latents, detached; the loss per sample and subject of each iteration, on the latents'
        device; and the counter.
    """
    start, end = settings.step_size_start, settings.step_size_end
    eta = start + (end - start) * step / settings.guided_steps
    losses: list[Tensor] = []
    for _ in range(settings.iterations):
        if losses and losses[-1].item() < settings.threshold:
            break
        first, second = (settings.penalty_scale * penalty_weight(counter + part) for part in (0, 1))
        counter += 2
        loss, gradient = differentiate(latents, (first, second))
        latents = latents - eta * gradient
        losses.append(loss.clone())  # the next iteration may overwrite it
    return latents, torch.stack(losses) if losses else latents.new_zeros(0), counter
