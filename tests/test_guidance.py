"""Guidance: α against its table, the loss against a derivation by loops, the rule that stops the descent."""

import json
import math
from pathlib import Path

import pytest
import torch

from mifo.method.guidance.descent import descend, loss_and_gradient, penalty_weight
from mifo.method.guidance.loss import attention_sums, guidance_loss, guidance_term
from mifo.method.guidance.settings import GuidanceSettings


def test_alpha_follows_the_reference_schedule():
    table = json.loads((Path(__file__).parent / "vectors" / "alpha_schedule.json").read_text())
    assert len(table["counter"]) == 170
    assert [penalty_weight(counter) for counter in table["counter"]] == pytest.approx(
        table["alpha"], abs=1e-7
    )


def test_alpha_stays_at_its_end_late_in_a_run():
    assert penalty_weight(149) > 0.01
    assert penalty_weight(150) == penalty_weight(10_000) == 0.01


def test_loss_equals_a_derivation_by_loops():
    """Two samples, two overlapping subjects; the second has no pixel in the coarser layer."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 1]], dtype=torch.bool)  # 5 is end-of-text
    shapes = {9: torch.zeros(1, 2, 9, dtype=torch.bool), 4: torch.zeros(1, 2, 4, dtype=torch.bool)}
    shapes[9][0, 0, [0, 1, 2, 4]] = True
    shapes[9][0, 1, [4, 5]] = True
    shapes[4][0, 0, 0] = True
    cross = {n: torch.rand(2, 3, n, 6, generator=generator).softmax(-1) for n in (9, 4)}
    own = {n: torch.rand(2, 3, n, n, generator=generator).softmax(-1) for n in (9, 4)}

    def by_loops(probabilities, context, sample, subject):
        foreground = background = 0.0
        for n, maps in probabilities.items():
            for head, pixel, key in torch.cartesian_prod(*map(torch.arange, maps.shape[1:])).tolist():
                if key in context(n):
                    if shapes[n][0, subject, pixel]:
                        foreground += maps[sample, head, pixel, key].item() / 2
                    elif not shapes[n][0, :, pixel].any():
                        background += maps[sample, head, pixel, key].item() / 2
        return foreground, background

    expected = 0.0
    for sample in range(2):
        for subject in range(2):
            for probabilities, weight, alpha, context in (
                (cross, 1.5, penalty_weight(59), lambda n, s=subject: tokens[s].nonzero().flatten().tolist()),
                (
                    own,
                    0.5,
                    penalty_weight(60),
                    lambda n, s=subject: shapes[n][0, s].nonzero().flatten().tolist(),
                ),
            ):
                f, b = by_loops(probabilities, context, sample, subject)
                expected += weight * ((1 - f / (f + b)) ** 2 + alpha * math.log(1 + b))

    assert penalty_weight(59) != penalty_weight(60)
    loss = guidance_loss(
        [attention_sums(cross[n], shapes[n], tokens[None]) for n in (9, 4)],
        [attention_sums(own[n], shapes[n], shapes[n]) for n in (9, 4)],
        (penalty_weight(59), penalty_weight(60)),
        GuidanceSettings(),
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_without_penalty_it_is_the_loss_of_bounded_attention():
    sums = torch.tensor([3.0, 1.0]).view(2, 1, 1)
    loss = guidance_loss([sums], [sums], (0.0, 0.0), GuidanceSettings())
    assert loss.item() == pytest.approx(2.0 * 0.25**2)


def test_a_subject_without_pixels_and_a_picture_without_background_give_no_nan():
    sums = torch.zeros(2, 1, 1, requires_grad=True)
    term = guidance_term([sums], 0.1).sum()
    term.backward()
    assert term.item() == 1.0
    assert sums.grad.isfinite().all()


def _sums_of(latents):
    """One cross layer of one sample and subject: F = 1/z − 1 and B = 1, so that the loss is 1.5·z²."""
    z = latents.flatten()[0]
    return [torch.stack([1 / z - 1, torch.ones_like(z)]).view(2, 1, 1)], []


def by(read_sums, settings):
    """What the descent asks for, out of sums."""
    return lambda latents, alphas: loss_and_gradient(latents, read_sums, alphas, settings)


def test_descent_stops_before_the_iteration_after_a_small_loss():
    settings = GuidanceSettings(penalty_scale=0.0, step_size_start=0.1, step_size_end=0.1, iterations=9)
    latents, losses, counter = descend(torch.full((1, 1, 1, 1), 0.9), by(_sums_of, settings), 0, 0, settings)
    # 1 − F/(F + 1) = z, so each iteration is z ← z − 0.1·3z = 0.7z
    assert losses.tolist() == pytest.approx([1.5 * (0.9 * 0.7**i) ** 2 for i in range(4)], rel=1e-4)
    assert losses[-2] >= settings.threshold > losses[-1]
    assert latents.item() == pytest.approx(0.9 * 0.7**4, rel=1e-4)
    assert counter == 8
    assert not latents.requires_grad


def test_every_step_takes_at_least_one_iteration_and_at_most_those_allowed():
    below = GuidanceSettings(penalty_scale=0.0)
    latents, losses, counter = descend(torch.full((1, 1, 1, 1), 0.1), by(_sums_of, below), 14, 30, below)
    assert (len(losses), counter) == (1, 32)
    assert latents.item() == pytest.approx(0.1 - 2.4 * 0.3, rel=1e-4)
    never = GuidanceSettings(threshold=0.0, step_size_start=0.01, step_size_end=0.01)
    assert len(descend(torch.full((1, 1, 1, 1), 0.9), by(_sums_of, never), 0, 0, never)[1]) == 5


def test_loss_is_counted_per_sample_and_subject():
    """Summed over 2 samples of 3 subjects the loss is far above the threshold, for each it is below."""

    def read(latents):
        sums = torch.stack([latents.new_full((2, 3), 9.0), latents.sum().expand(2, 3)])
        return [sums], [sums]

    settings = GuidanceSettings(penalty_scale=0.0, step_size_start=0.0, step_size_end=0.0)
    _, losses, _ = descend(torch.ones(1, 1, 1, 1) * 3, by(read, settings), 0, 0, settings)
    assert losses.tolist() == pytest.approx([2.0 * 0.25**2])
