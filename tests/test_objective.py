"""Both stages' losses against the reference vectors, and what those do not pin."""

from dataclasses import replace

import pytest
import torch
from terms import one_term, penalty
from torch.nn import functional as F
from vector_model import VectorModel, cross_number, prompt

from mifo.data.mask_pyramid import MaskPyramid
from mifo.method.backbone import Stage
from mifo.method.diffusion.ddim import DDIM
from mifo.method.losses.settings import PenaltySettings
from mifo.method.losses.timeline import Timeline
from mifo.method.objective import LossParts, StepInputs, learning_loss

PROCESS = DDIM((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()).cumprod(0))
MIFO = penalty("mifo")
PENALTY = one_term("penalty", 2e-2, time_below=0.5)
STEPS = 600


class Draw:
    """What the inputs of a step are made of, with masks (B, K, H, W) as a picture has them."""

    def __init__(self, latents, noise, times, states, word_positions, masks, valid):
        self.latents, self.noise, self.times, self.states = latents, noise, times, states
        self.word_positions, self.masks, self.valid = word_positions, masks, valid

    def but(self, **changes):
        return Draw(**{**vars(self), **changes})

    def rows(self, *chosen, kept=2):
        """The chosen samples of a draw without class samples, with the first `kept` instances of each."""
        index = list(chosen)
        ours = {name: getattr(self, name)[index] for name in ("latents", "noise", "times", "states")}
        theirs = {name: getattr(self, name)[index, :kept] for name in ("word_positions", "masks", "valid")}
        return Draw(**ours, **theirs)

    def inputs(self, model: VectorModel) -> StepInputs:
        sizes = {site.size for site in model.sites}
        pyramids = [MaskPyramid.of(each, sizes, model.latent_shape[1:]) for each in self.masks]
        instances = list(range(self.masks.shape[1]))
        levels = [pyramid.rows(0, instances) for pyramid in pyramids]
        return StepInputs(
            self.latents,
            self.noise,
            self.times,
            self.word_positions,
            {size: torch.stack([at[size] for at, _ in levels]) for size in sizes},
            torch.stack([latent for _, latent in levels]),
            self.valid,
        )


def draw_of(vector: dict[str, torch.Tensor]) -> Draw:
    """What a learning vector holds, with a leaf for the gradient to the prompts."""
    positions = vector["token_positions"][None]
    return Draw(
        latents=vector["latents"],
        noise=vector["noise"],
        times=vector["timestep"],
        states=vector["encoder_hidden_states"].clone().requires_grad_(),
        word_positions=positions,
        masks=vector["masks"][None].float(),
        valid=torch.ones(positions.shape),
    )


def loss_of(
    unet: torch.nn.Module,
    stage: Stage,
    draw: Draw,
    settings: PenaltySettings,
    step: int = 0,
    process: DDIM = PROCESS,
) -> LossParts:
    model = VectorModel(unet, process, draw.latents.shape[-1])
    timeline = Timeline(settings, stage, STEPS, model)
    terms = timeline.active(step)
    weights = torch.tensor([timeline.weight(term, step) for term in terms])
    prior_weight = 1.0 if stage == "finetuning" else 0.0
    return learning_loss(model, prompt(draw.states), draw.inputs(model), terms, weights, prior_weight)


def assert_agrees(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture
def instances() -> Draw:
    """Two samples of two overlapping instances each, of which the second sample's second is padding."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(2, 2, 64, 64)
    masks[:, 0, 8:40, 8:40], masks[:, 1, 24:56, 16:48] = 1, 1
    return Draw(
        latents=torch.randn(2, 4, 32, 32, generator=generator),
        noise=torch.randn(2, 4, 32, 32, generator=generator),
        times=torch.tensor([100, 300]),
        states=torch.randn(2, 77, 32, generator=generator),
        word_positions=torch.tensor([[4, 6], [5, 0]]),
        masks=masks,
        valid=torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
    )


@pytest.mark.parametrize(
    ("name", "stage", "step"),
    [("reward", "semantic", 199), ("penalty", "semantic", 200), ("finetune", "finetuning", 0)],
)
def test_losses_maps_and_gradients_agree_with_the_reference(name, stage, step, vector_unet, vectors):
    vector = vectors(name)
    draw = draw_of(vector)
    loss = loss_of(vector_unet, stage, draw, MIFO, step)
    for part in ("denoising", "prior", "attention", "total"):
        assert_agrees(getattr(loss, part), vector[f"expected_{part}_loss"])
    model = VectorModel(vector_unet, PROCESS, 64)
    read = [cross_number(model, site) for site in loss.maps]
    expected = [key for key in vector if key.startswith("expected_attention_map_layer")]
    assert sorted(f"expected_attention_map_layer{number}" for number in read) == sorted(expected)
    for number, maps in zip(read, loss.maps.values(), strict=True):
        assert_agrees(maps[0].permute(1, 2, 0), vector[f"expected_attention_map_layer{number}"])
    (gradient,) = torch.autograd.grad(loss.total, draw.states)
    assert_agrees(gradient, vector["expected_grad_encoder_hidden_states"], 1e-4)


@pytest.mark.parametrize(("time", "counts"), [(499, True), (500, False)])
def test_attention_counts_in_the_lower_half_of_the_time_only(time, counts, vector_unet, instances):
    loss = loss_of(vector_unet, "semantic", instances.but(times=torch.tensor([time, time])), PENALTY)
    assert (loss.attention > 0) == counts
    torch.testing.assert_close(loss.total, loss.denoising + loss.attention)


@pytest.mark.parametrize(("times", "counts"), [((900, 100), True), ((100, 900), False)])
def test_the_time_of_the_instance_opens_the_gate_not_that_of_the_class(times, counts, vector_unet, instances):
    sample = instances.rows(1)
    both = instances.but(
        times=torch.tensor(times),
        **{name: getattr(sample, name) for name in ("word_positions", "masks", "valid")},
    )
    loss = loss_of(vector_unet, "finetuning", both, PENALTY)
    assert (loss.attention > 0) == counts
    assert loss.prior > 0


def test_stage_two_is_the_class_sample_and_all_selected_instances(vector_unet, instances):
    class_sample, sample = instances.rows(1), instances.rows(0)
    both = sample.but(
        **{
            name: torch.cat([getattr(class_sample, name), getattr(sample, name)])
            for name in ("latents", "noise", "times", "states")
        }
    )
    loss = loss_of(vector_unet, "finetuning", both, PENALTY)

    noisy = PROCESS.add_noise(both.latents, both.noise, both.times)
    prediction = vector_unet(noisy, both.times, both.states).sample
    union = torch.zeros(32, 32)
    union[4:20, 4:20] = union[12:28, 8:24] = 1
    torch.testing.assert_close(loss.prior, F.mse_loss(prediction[0], both.noise[0]))
    torch.testing.assert_close(loss.denoising, F.mse_loss(prediction[1] * union, both.noise[1] * union))
    second = sample.but(word_positions=torch.tensor([[6]]), masks=sample.masks[:, 1:], valid=torch.ones(1, 1))
    alone = [
        loss_of(vector_unet, "finetuning", one, PENALTY).attention
        for one in (instances.rows(0, kept=1), second)
    ]
    torch.testing.assert_close(loss.attention, sum(alone))


@pytest.mark.parametrize("loss", ["reward", "penalty", "break_a_scene"])
def test_padding_changes_nothing_and_samples_are_averaged(loss, vector_unet, instances):
    settings = one_term(loss, time_below=0.5)
    batch = loss_of(vector_unet, "semantic", instances, settings)
    first = loss_of(vector_unet, "semantic", instances.rows(0), settings)
    second = loss_of(vector_unet, "semantic", instances.rows(1, kept=1), settings)
    assert batch.attention > 0
    for part in ("denoising", "attention", "total"):
        torch.testing.assert_close(getattr(batch, part), (getattr(first, part) + getattr(second, part)) / 2)


def test_terms_that_are_active_at_once_add_up(vector_unet, instances):
    parts = [one_term("reward", 0.3), one_term("penalty", 0.7, time_below=0.2)]
    both = PenaltySettings({name: term for each in parts for name, term in each.terms.items()})
    loss = loss_of(vector_unet, "semantic", instances, both)
    alone = [loss_of(vector_unet, "semantic", instances, each).attention for each in parts]
    torch.testing.assert_close(loss.attention, sum(alone))
    assert min(alone) > 0


def test_the_velocity_is_the_target_of_a_model_that_predicts_it(vector_unet, instances):
    velocity = replace(PROCESS, prediction_type="v_prediction")
    draw = instances.but(masks=torch.ones_like(instances.masks))
    loss = loss_of(vector_unet, "semantic", draw, PENALTY, process=velocity)
    noisy = PROCESS.add_noise(draw.latents, draw.noise, draw.times)
    alpha = PROCESS.alphas_cumprod[draw.times][:, None, None, None]
    target = (alpha.sqrt() * noisy - draw.latents) / (1 - alpha).sqrt()
    prediction = vector_unet(noisy, draw.times, draw.states).sample
    torch.testing.assert_close(loss.denoising, F.mse_loss(prediction, target), rtol=1e-4, atol=1e-6)


def test_the_loss_never_waits_for_values(vector_unet, instances, monkeypatch):
    """What a captured step reads, words, times, masks and weights, decides nothing in Python."""

    def waits(*_):
        raise AssertionError("the loss waited for a value")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    model = VectorModel(vector_unet, PROCESS)
    terms = Timeline(PENALTY, "semantic", STEPS, model).active(0)
    learning_loss(model, prompt(instances.states), instances.inputs(model), terms, torch.ones(1))


def test_without_a_term_nothing_is_read(vector_unet, instances):
    loss = loss_of(vector_unet, "semantic", instances, PenaltySettings())
    assert loss.maps == {}
    assert loss.attention == 0
