"""The descent of the latents on the guidance loss before one denoising step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mifo.method.guidance.alpha import penalty_weights, step_size
from mifo.method.guidance.loss import guidance_loss
from mifo.method.guidance.settings import GuidanceSettings

ReadSums = Callable[[Tensor], tuple[Sequence[Tensor], Sequence[Tensor]]]
Differentiate = Callable[[Tensor, tuple[float, float]], tuple[Tensor, Tensor]]


def loss_and_gradient(
    latents: Tensor, read_sums: ReadSums, alphas: Sequence[float] | Tensor, settings: GuidanceSettings
) -> tuple[Tensor, Tensor]:
    """The guidance loss per sample and subject, a scalar, and ∇_z L, (B, 4, H, W), both detached.

    Args:
        latents: (B, 4, H, W), detached.
        read_sums: runs the U-Net on latents; gives the sums (2, B, S) of each cross and each self layer.
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
    `settings.threshold`: each step takes at least one, and one that falls below still moves the latents.

    Args:
        latents: (B, 4, H, W), detached.
        differentiate: `loss_and_gradient` of latents and both α.
        step: the denoising step, from 0.
        counter: readings of α in earlier steps.

    Returns:
        The guided latents, detached; the loss per sample and subject of each iteration, on the latents'
        device; and the counter.
    """
    eta = step_size(step, settings.guided_steps, settings.step_size_start, settings.step_size_end)
    losses: list[Tensor] = []
    for _ in range(settings.iterations):
        if losses and losses[-1].item() < settings.threshold:
            break
        alphas, counter = penalty_weights(counter, settings.penalty_scale)
        loss, gradient = differentiate(latents, alphas)
        latents = latents - eta * gradient
        losses.append(loss.clone())  # the next iteration may overwrite it
    return latents, torch.stack(losses) if losses else latents.new_zeros(0), counter
