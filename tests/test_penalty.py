"""The attention losses against hand-made maps, and when each of them is active."""

import pytest
import torch
from mifo.backbones.unet.layers import choose_layers
from mifo.method.losses.active import active_term, attention_loss, layers_read, timestep_gate
from mifo.method.losses.masks import resize_masks
from torch.nn import functional as F

from mifo.method.losses.break_a_scene import break_a_scene
from mifo.method.losses.penalty import penalty
from mifo.method.losses.reward import reward
from mifo.method.losses.settings import AttentionTerm, PenaltySettings

MASK = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
ATTENTION = torch.tensor([[0.5, 0.1], [0.2, 0.0]])


def test_reward_wants_half_of_the_attention_inside_and_none_outside():
    assert reward(0.5 * MASK, MASK) == 0
    assert reward(ATTENTION, MASK).item() == pytest.approx((0.4**2 + 0.2**2) / 4)


def test_penalty_is_blind_inside_the_mask():
    assert penalty(MASK * torch.rand(2, 2), MASK) == 0
    assert penalty(ATTENTION, MASK).item() == pytest.approx(0.2**2 / 4)


def test_break_a_scene_matches_the_shape_whatever_the_level():
    assert break_a_scene(0.03 * MASK, MASK) == 0
    assert break_a_scene(ATTENTION, MASK).item() == pytest.approx((0.8**2 + 0.4**2) / 4)
    assert break_a_scene(torch.zeros(2, 2), MASK).item() == pytest.approx(0.5)


def test_masks_are_resized_without_antialiasing():
    # at a quarter of the side, bilinear sampling reads the mean of the two middle pixels of every four
    row = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    assert resize_masks(row.expand(1, 1, 8, 8), 2)[0, 0, 0].tolist() == [0.5, 0.0]


@pytest.mark.parametrize("term", ["reward", "penalty"])
def test_losses_are_summed_over_layers_and_instances_and_averaged_over_samples(term):
    torch.manual_seed(0)
    maps = {13: torch.rand(2, 4, 3), 21: torch.rand(2, 16, 3)}
    masks = (torch.rand(2, 3, 16, 16) > 0.5).float()
    valid, gate = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), torch.tensor([1.0, 0.0])
    expected = 0.0
    for side, flat in ((2, maps[13]), (4, maps[21])):
        for instance in range(2):
            attention = flat[0, :, instance].reshape(side, side)
            mask = F.interpolate(masks[:1, instance : instance + 1], (side, side), mode="bilinear")[0, 0]
            error = 0.5 * mask - attention if term == "reward" else attention * (1 - mask)
            expected += error.pow(2).mean()
    assert attention_loss(AttentionTerm(term), maps, masks, valid, gate).item() == pytest.approx(
        expected.item() / 2
    )


def test_break_a_scene_averages_layers_before_normalising():
    maps = {
        9: torch.tensor([[0.4, 0.0, 0.1, 0.0]])[..., None],
        11: torch.tensor([[0.0, 0.2, 0.1, 0.0]])[..., None],
    }
    loss = attention_loss(
        AttentionTerm.break_a_scene, maps, MASK[None, None], torch.ones(1, 1), torch.ones(1)
    )
    assert loss.item() == pytest.approx((0.5**2 + 0.5**2) / 4)


def test_no_term_is_no_loss():
    loss = attention_loss(AttentionTerm.none, {}, torch.ones(1, 2, 8, 8), torch.ones(1, 2), torch.ones(1))
    assert loss == 0


def test_the_gate_is_open_below_the_limit_only():
    assert timestep_gate(torch.tensor([0, 499, 500, 999]), 500).tolist() == [1, 1, 0, 0]


def test_the_reward_comes_first_and_the_penalty_from_step_200():
    settings = PenaltySettings()
    active = [
        active_term(settings, *when)
        for when in (("semantic", 0), ("semantic", 199), ("semantic", 200), ("finetuning", 0))
    ]
    assert [(each.term, each.weight) for each in active] == [
        ("reward", 1e-2),
        ("reward", 1e-2),
        ("penalty", 2e-2),
        ("penalty", 2e-2),
    ]


def test_each_term_reads_its_layers(vector_unet):
    choice = choose_layers(vector_unet)
    assert layers_read(AttentionTerm.none, "semantic", choice) == ()
    assert layers_read(AttentionTerm.penalty, "semantic", choice) == choice.semantic
    assert layers_read(AttentionTerm.penalty, "finetuning", choice) == choice.finetuning
    assert layers_read(AttentionTerm.break_a_scene, "semantic", choice) == choice.finetuning
