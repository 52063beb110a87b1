"""The attention losses against hand-made maps, and when each term is active, where and with which weight."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from terms import one_term, penalty
from torch.nn import functional as F
from vector_model import VectorModel

from mifo.data.mask_pyramid import MaskPyramid
from mifo.errors import MifoError
from mifo.method.backbone import DefaultSites, Site
from mifo.method.losses.attention_loss import AttentionLoss, find_loss, known_losses
from mifo.method.losses.break_a_scene import BreakAScene
from mifo.method.losses.dice import Dice
from mifo.method.losses.divergence import Divergence
from mifo.method.losses.penalty import Penalty
from mifo.method.losses.reward import Reward
from mifo.method.losses.settings import PenaltySettings, Ramp, TermSettings
from mifo.method.losses.soft_iou import SoftIoU
from mifo.method.losses.timeline import Timeline, attention_loss, check_penalty

MASK = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
ATTENTION = torch.tensor([[0.5, 0.1], [0.2, 0.0]])
SMALL, LARGE = Site(13, "small", "words", (2, 2)), Site(21, "large", "words", (4, 4))


class Sites:
    """All that a timeline asks of a model."""

    sites = (Site(0, "first", "pixels", (4, 4)), SMALL, LARGE, Site(22, "last", "words", (4, 4)))
    default_sites = DefaultSites((SMALL, LARGE), (LARGE,), (), ())


def timeline(settings: PenaltySettings, stage: str = "semantic", steps: int = 600) -> Timeline:
    return Timeline(settings, stage, steps, Sites())


def loss_of(loss: AttentionLoss, attention: torch.Tensor) -> float:
    """Of one sample and instance at one site."""
    return loss({SMALL: attention[None, None]}, {SMALL.size: MASK[None, None]}).item()


class Sharp(AttentionLoss):
    """A loss of somebody else's, by the dotted path of this class."""

    def __call__(self, maps, masks):
        return sum((attention - masks[site.size]).abs().amax((-2, -1)) for site, attention in maps.items())


def test_reward_wants_half_of_the_attention_inside_and_none_outside():
    assert loss_of(Reward(), 0.5 * MASK) == 0
    assert loss_of(Reward(), ATTENTION) == pytest.approx((0.4**2 + 0.2**2) / 4)


def test_penalty_is_blind_inside_the_mask():
    assert loss_of(Penalty(), MASK * torch.rand(2, 2)) == 0
    assert loss_of(Penalty(), ATTENTION) == pytest.approx(0.2**2 / 4)


def test_break_a_scene_matches_the_shape_whatever_the_level():
    assert loss_of(BreakAScene(), 0.03 * MASK) == 0
    assert loss_of(BreakAScene(), ATTENTION) == pytest.approx((0.8**2 + 0.4**2) / 4)
    assert loss_of(BreakAScene(), torch.zeros(2, 2)) == pytest.approx(0.5)


def random_maps(count: int, dtype: torch.dtype = torch.float64) -> tuple[dict, dict]:
    """Maps and masks of two samples at two sites of one size."""
    torch.manual_seed(count)
    sites = [Site(9, "a", "words", (4, 4)), Site(11, "b", "words", (4, 4))]
    maps = {site: 0.02 + torch.rand(2, count, 4, 4, dtype=dtype) for site in sites}
    masks = (torch.rand(2, count, 4, 4, dtype=dtype) > 0.5).to(dtype)
    masks[..., 0, 0] = 1  # none is empty, as padding is
    return maps, {(4, 4): masks}


def test_dice_and_soft_iou_of_sets_are_those_of_sets():
    attention = torch.tensor([[0.3, 0.0], [0.3, 0.0]])  # half of it lies in the mask, whose half it fills
    assert loss_of(Dice(), attention) == pytest.approx(1 - 2 * 1 / (2 + 2))
    assert loss_of(SoftIoU(), attention) == pytest.approx(1 - 1 / 3)
    for loss in (Dice(), SoftIoU()):
        assert loss_of(loss, 0.03 * MASK) == pytest.approx(0, abs=1e-6)
        assert loss_of(loss, 1 - MASK) == pytest.approx(1, abs=1e-6)
        assert loss_of(loss, torch.zeros(2, 2)) == pytest.approx(1, abs=1e-6)


def test_dice_and_soft_iou_are_what_numpy_makes_of_their_formulas():
    maps, masks = random_maps(3)
    dice, soft_iou = Dice()(maps, masks), SoftIoU()(maps, masks)
    for b, k in np.ndindex(2, 3):
        mask, each = masks[4, 4][b, k].numpy(), [attention[b, k].numpy() for attention in maps.values()]
        mean = (each[0] + each[1]) / 2
        mean = mean / mean.max()
        assert dice[b, k].item() == pytest.approx(1 - 2 * (mean * mask).sum() / (mean.sum() + mask.sum()))
        ious = []
        for attention in each:
            own = attention / attention.max()
            ious.append((own * mask).sum() / (own.sum() + mask.sum() - (own * mask).sum()))
        assert soft_iou[b, k].item() == pytest.approx(1 - sum(ious) / 2)


def test_divergence_is_the_mean_symmetric_kl_of_all_pairs():
    maps, masks = random_maps(3)
    found = Divergence()(maps, masks)
    mean = sum(maps.values()) / 2
    for b in range(2):
        shares = [(mean[b, k] / mean[b, k].sum()).flatten().numpy() for k in range(3)]
        total = sum(
            (entropy(shares[i], shares[j]) + entropy(shares[j], shares[i])) / 2
            for i, j in permutations(range(3), 2)
        )
        assert found[b].sum().item() == pytest.approx(-total / (3 * 2))


def test_divergence_leaves_out_padding_and_an_instance_alone():
    maps, masks = random_maps(3)
    two = ({site: each[:, :2] for site, each in maps.items()}, {(4, 4): masks[4, 4][:, :2]})
    masks[4, 4][:, 2] = 0  # as of padding
    padded = Divergence()(maps, masks)
    torch.testing.assert_close(padded[:, :2], Divergence()(*two))
    masks[4, 4][:, 1] = 0
    assert not padded[:, 2].any() and not Divergence()(maps, masks).any()


def test_divergence_falls_as_maps_part_and_stays_finite_where_they_never_meet():
    left, right = torch.eye(4).view(4, 2, 2)[:2]

    def of(one, other):
        maps = {SMALL: torch.stack([one, other])[None]}
        return Divergence()(maps, {SMALL.size: torch.ones(1, 2, 2, 2)}).sum().item()

    near, far = of(left + 0.5 * right, right + 0.5 * left), of(left + 0.1 * right, right + 0.1 * left)
    assert of(left, left) == pytest.approx(0, abs=1e-6) and 0 > near > far > of(left, right) > -18.5


@pytest.mark.parametrize("loss", [Dice(), Divergence(), SoftIoU()])
def test_gradients_of_the_losses_of_2025_and_2026_are_those_of_differences(loss):
    maps, masks = random_maps(3)
    sites = list(maps)

    def of(*attention):
        return loss(dict(zip(sites, attention, strict=True)), masks)

    assert torch.autograd.gradcheck(of, [each.requires_grad_() for each in maps.values()])


@pytest.mark.parametrize("loss", [Dice(), Divergence(), SoftIoU()])
def test_a_map_without_attention_has_finite_gradients(loss):
    maps = {SMALL: torch.zeros(1, 2, 2, 2, requires_grad=True)}
    loss(maps, {SMALL.size: MASK.expand(1, 2, 2, 2)}).sum().backward()
    assert maps[SMALL].grad.isfinite().all()


def test_masks_are_resized_without_antialiasing():
    # at a quarter of the side, bilinear sampling reads the mean of the two middle pixels of every four
    row = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    pyramid = MaskPyramid.of(row.expand(1, 8, 8), {(2, 2)}, (4, 4))
    assert pyramid.at[2, 2][0, 0, 0].tolist() == [0.5, 0.0]


@pytest.mark.parametrize("loss", ["reward", "penalty"])
def test_losses_are_summed_over_layers_and_instances_and_averaged_over_samples(loss):
    torch.manual_seed(0)
    maps = {SMALL: torch.rand(2, 3, 2, 2), LARGE: torch.rand(2, 3, 4, 4)}
    masks = (torch.rand(2, 3, 16, 16) > 0.5).float()
    resized = {site.size: F.interpolate(masks, site.size, mode="bilinear") for site in maps}
    valid, share = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), torch.tensor([0.1, 0.9])
    expected = 0.0
    for site, per_instance in maps.items():
        for instance in range(2):
            attention = per_instance[0, instance]
            mask = F.interpolate(masks[:1, instance : instance + 1], site.size, mode="bilinear")[0, 0]
            error = 0.5 * mask - attention if loss == "reward" else attention * (1 - mask)
            expected += error.pow(2).mean()
    terms = timeline(one_term(loss, time_below=0.5)).active(0)
    found = attention_loss(terms, torch.ones(1), maps, resized, valid, share)
    assert found.item() == pytest.approx(expected.item() / 2)


def test_break_a_scene_averages_layers_before_normalising():
    maps = {
        Site(9, "a", "words", (2, 2)): torch.tensor([[0.4, 0.0], [0.1, 0.0]])[None, None],
        Site(11, "b", "words", (2, 2)): torch.tensor([[0.0, 0.2], [0.1, 0.0]])[None, None],
    }
    loss = BreakAScene()(maps, {(2, 2): MASK[None, None]})
    assert loss.item() == pytest.approx((0.5**2 + 0.5**2) / 4)


def test_several_terms_add_up_each_with_its_weight_its_sites_and_its_gate():
    torch.manual_seed(0)
    maps = {site: torch.rand(2, 1, *site.size) for site in (SMALL, LARGE)}
    masks = {site.size: torch.rand(2, 1, *site.size).round() for site in maps}
    settings = PenaltySettings(
        {
            "wide": TermSettings("penalty", 3.0),
            "early": TermSettings("reward", 0.5, time_below=0.3, sites=["2"]),
            "mine": TermSettings("test_losses.Sharp", 2.0, sites=["large"]),
        }
    )
    terms = timeline(settings).active(0)
    assert [(term.name, term.sites) for term in terms] == [
        ("wide", (SMALL, LARGE)),
        ("early", (SMALL,)),
        ("mine", (LARGE,)),
    ]
    valid, share = torch.ones(2, 1), torch.tensor([0.2, 0.4])
    found = attention_loss(terms, torch.tensor([3.0, 0.5, 2.0]), maps, masks, valid, share)
    wide, mine = Penalty()(maps, masks), Sharp()({LARGE: maps[LARGE]}, masks)
    early = Reward()({SMALL: maps[SMALL]}, masks)
    expected = 3.0 * wide.mean() + 0.5 * early[0].mean() / 2 + 2.0 * mine.mean()
    torch.testing.assert_close(found, expected)


def test_no_term_is_no_loss():
    assert timeline(PenaltySettings()).active(0) == ()
    assert attention_loss((), torch.ones(0), {}, {}, torch.ones(1, 2), torch.ones(1)) == 0


def test_a_term_counts_below_its_share_of_the_time_only():
    terms = timeline(one_term("penalty", time_below=0.5)).active(0)
    maps, masks = {site: torch.ones(1, 1, *site.size) for site in (SMALL, LARGE)}, {}
    masks = {site.size: torch.zeros(1, 1, *site.size) for site in maps}
    shares = [0.0, 0.499, 0.5, 0.999]
    losses = [
        attention_loss(terms, torch.ones(1), maps, masks, torch.ones(1, 1), torch.tensor([share])).item()
        for share in shares
    ]
    assert losses == [2, 2, 0, 0]


def test_the_reward_comes_first_and_the_penalty_from_step_200():
    active = []
    for stage, step in (("semantic", 0), ("semantic", 199), ("semantic", 200), ("finetuning", 0)):
        line = timeline(penalty("mifo"), stage)
        active += [[(each.settings.loss, line.weight(each, step)) for each in line.active(step)]]
    assert active == [[("reward", 1e-2)], [("reward", 1e-2)], [("penalty", 2e-2)], [("penalty", 2e-2)]]


@pytest.mark.parametrize(
    ("option", "semantic", "finetuning"),
    [
        ("break_a_scene", ["break_a_scene"] * 3, "break_a_scene"),
        ("dice", ["dice"] * 3, "dice"),
        ("divergence", ["divergence"] * 3, "divergence"),
        ("from_start", ["penalty"] * 3, "penalty"),
        ("mifo", ["reward", "reward", "penalty"], "penalty"),
        ("no_penalty", ["reward", "reward", None], None),
        ("no_reward", [None, None, "penalty"], "penalty"),
        ("none", [None] * 3, None),
        ("reward", ["reward"] * 3, None),
        ("reward_kept", ["reward"] * 3, "reward"),
        ("soft_iou", ["soft_iou"] * 3, "soft_iou"),
    ],
)
def test_every_option_is_active_when_it_says(option, semantic, finetuning):
    def loss_at(stage, step):
        active = timeline(penalty(option), stage).active(step)
        assert len(active) < 2
        return active[0].settings.loss if active else None

    assert [loss_at("semantic", step) for step in (0, 199, 200)] == semantic
    assert {loss_at("finetuning", step) for step in (0, 300)} == {finetuning}
    check_penalty(penalty(option))


def test_the_values_beside_the_terms_change_all_terms_that_refer_to_them():
    settings = penalty("mifo", reward_steps=3, reward_weight=7.0, time_below=1.0)
    assert {term.time_below for term in settings.terms.values()} == {1.0}
    line = timeline(settings)
    assert [line.active(step)[0].settings.loss for step in (2, 3)] == ["reward", "penalty"]
    assert line.weight(line.active(0)[0], 0) == 7.0


@pytest.mark.parametrize(
    ("ramp", "weights"),
    [
        ({}, [1.0] * 5),
        ({"ramp": Ramp.linear, "weight_end": 0.0}, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"ramp": Ramp.linear, "weight_end": 3.0}, [1.0, 1.5, 2.0, 2.5, 3.0]),
        ({"ramp": Ramp.cosine, "weight_end": 0.0}, [1.0, 0.853553, 0.5, 0.146447, 0.0]),
    ],
)
def test_a_ramp_leads_from_the_first_to_the_last_step_of_its_term(ramp, weights):
    line = timeline(one_term("penalty", from_step=10, to_step=15, **ramp))
    (term,) = line.active(10)
    assert [line.weight(term, step) for step in range(10, 15)] == pytest.approx(weights, abs=1e-6)
    assert [len(line.active(step)) for step in (9, 10, 14, 15)] == [0, 1, 1, 0]


def test_a_ramp_ends_with_its_stage_and_may_start_at_zero():
    settings = one_term("penalty", 0.0, ramp=Ramp.linear, weight_end=1.0)
    line = timeline(settings, steps=11)
    (term,) = line.active(0)
    assert [line.weight(term, step) for step in (0, 5, 10)] == pytest.approx([0, 0.5, 1])
    (term,) = timeline(settings, steps=1).active(0)
    assert timeline(settings, steps=1).weight(term, 0) == 0


def test_a_weight_of_zero_is_no_term():
    assert timeline(one_term("penalty", 0.0)).active(0) == ()


def test_spans_say_where_terms_begin_and_end():
    def told(settings, stage="semantic", steps=600):
        return [
            (first, last, [term.name for term in active])
            for first, last, active in timeline(settings, stage, steps).spans()
        ]

    assert told(penalty("mifo")) == [(0, 200, ["reward"]), (200, 600, ["penalty"])]
    assert told(penalty("mifo"), "finetuning") == [(0, 600, ["finetuning"])]
    assert told(penalty("mifo"), steps=100) == [(0, 100, ["reward"])]
    assert told(penalty("none")) == [(0, 600, [])]


def test_each_term_reads_its_layers(vector_unet):
    model = VectorModel(vector_unet, None)
    choice = model.default_sites

    def read(settings, stage):
        return Timeline(settings, stage, 600, model).sites

    assert read(penalty("none"), "semantic") == ()
    assert read(one_term("penalty"), "semantic") == choice.semantic
    assert read(one_term("penalty"), "finetuning") == choice.finetuning
    assert read(one_term("break_a_scene"), "semantic") == choice.finetuning


def test_sites_are_chosen_by_name_and_by_size(vector_unet):
    model = VectorModel(vector_unet, None)
    words = [site for site in model.sites if site.kind == "words"]

    def read(*sites):
        return Timeline(one_term("penalty", sites=list(sites)), "semantic", 600, model).sites

    assert read("16") == tuple(site for site in words if site.size == (16, 16)) != ()
    assert read(words[3].name) == (words[3],)
    both = read(words[3].name, "8", words[3].name)
    assert both == tuple(site for site in words if site.size == (8, 8) or site == words[3])
    pixels = next(site for site in model.sites if site.kind == "pixels")
    for unknown in ("7", "attn9", pixels.name):
        with pytest.raises(MifoError, match=rf"penalty\.terms\.penalty\.sites names {unknown}.*4, 8, 16, 32"):
            read(unknown)


def test_losses_are_found_by_the_name_of_their_file_or_the_path_of_their_class():
    known = {
        "break_a_scene": BreakAScene,
        "dice": Dice,
        "divergence": Divergence,
        "penalty": Penalty,
        "reward": Reward,
        "soft_iou": SoftIoU,
    }
    assert {name: type(find_loss(name)) for name in known_losses()} == known
    assert isinstance(find_loss("test_losses.Sharp"), Sharp)


@pytest.mark.parametrize(
    "name", ["rewarded", "nowhere.Loss", "test_losses.Missing", "test_losses.Sites", "timeline", "settings"]
)
def test_what_is_no_loss_is_refused_with_the_names_of_those_there_are(name):
    with pytest.raises(
        MifoError, match=rf"loss={name} .*break_a_scene, dice, divergence, penalty, reward, soft_iou"
    ):
        find_loss(name)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight": -1.0}, r"penalty\.terms\.mine\.weight=-1\.0"),
        ({"ramp": Ramp.linear, "weight_end": -1.0}, r"penalty\.terms\.mine\.weight"),
        ({"from_step": -1}, r"penalty\.terms\.mine\.from_step"),
        ({"to_step": -5}, r"penalty\.terms\.mine\..*to_step"),
        ({"time_below": 500}, r"penalty\.terms\.mine\.time_below=500.*0 to 1"),
        ({"ramp": Ramp.cosine}, r"penalty\.terms\.mine\.ramp=cosine.*weight_end"),
        ({"weight_end": 1.0}, r"penalty\.terms\.mine\.ramp=constant.*weight_end"),
        ({"sites": []}, r"penalty\.terms\.mine\.sites is empty"),
        ({"loss": "rewarded"}, "loss=rewarded"),
    ],
)
def test_impossible_terms_are_refused(changes, reason):
    term = TermSettings("reward", 1.0)
    check_penalty(PenaltySettings({"mine": term}))
    with pytest.raises(MifoError, match=reason):
        check_penalty(PenaltySettings({"mine": replace(term, **changes)}))
