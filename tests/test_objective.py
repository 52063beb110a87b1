"""Both stages' losses against the reference vectors, and what those do not pin."""

from dataclasses import replace

import pytest
import torch
from mifo.backbones.unet.layers import attention_layers, choose_layers
from mifo.backbones.unet.recording import AttentionRecorder
from mifo.method.losses.active import Stage, active_term, layers_read
from torch.nn import functional as F

from mifo.method.diffusion.noise_schedule import NoiseSchedule
from mifo.method.losses.settings import AttentionTerm, PenaltySettings, TermSettings
from mifo.method.objective import LossParts, StepInputs, finetuning_loss, semantic_loss

SETTINGS = PenaltySettings()
SCHEDULE = NoiseSchedule((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()).cumprod(0))
PENALTY = TermSettings(AttentionTerm.penalty, 2e-2)


def step_inputs(vector: dict[str, torch.Tensor]) -> StepInputs:
    """The inputs that a learning vector holds, with a leaf for the gradient to the prompts."""
    positions = vector["token_positions"][None]
    return StepInputs(
        latents=vector["latents"],
        noise=vector["noise"],
        timesteps=vector["timestep"],
        encoder_hidden_states=vector["encoder_hidden_states"].clone().requires_grad_(),
        token_positions=positions,
        masks=vector["masks"][None].float(),
        valid=torch.ones(positions.shape),
    )


def loss_of(
    unet: torch.nn.Module,
    stage: Stage,
    inputs: StepInputs,
    term: TermSettings,
    schedule: NoiseSchedule = SCHEDULE,
) -> LossParts:
    with AttentionRecorder(unet, layers_read(term.term, stage, choose_layers(unet))) as recorder:
        if stage == "semantic":
            return semantic_loss(unet, recorder, schedule, inputs, term, SETTINGS.timestep_limit)
        return finetuning_loss(
            unet, recorder, schedule, inputs, term, SETTINGS.timestep_limit, prior_weight=1.0
        )


def assert_agrees(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture
def instances() -> StepInputs:
    """Two samples of two overlapping instances each, of which the second sample's second is padding."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(2, 2, 64, 64)
    masks[:, 0, 8:40, 8:40], masks[:, 1, 24:56, 16:48] = 1, 1
    return StepInputs(
        latents=torch.randn(2, 4, 32, 32, generator=generator),
        noise=torch.randn(2, 4, 32, 32, generator=generator),
        timesteps=torch.tensor([100, 300]),
        encoder_hidden_states=torch.randn(2, 77, 32, generator=generator),
        token_positions=torch.tensor([[4, 6], [5, 0]]),
        masks=masks,
        valid=torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
    )


def rows(inputs: StepInputs, *chosen: int, kept: int = 2) -> StepInputs:
    """The chosen samples of a batch without class samples, with the first `kept` instances of each."""
    index = list(chosen)
    return StepInputs(
        latents=inputs.latents[index],
        noise=inputs.noise[index],
        timesteps=inputs.timesteps[index],
        encoder_hidden_states=inputs.encoder_hidden_states[index],
        token_positions=inputs.token_positions[index, :kept],
        masks=inputs.masks[index, :kept],
        valid=inputs.valid[index, :kept],
    )


@pytest.mark.parametrize(
    ("name", "stage", "step"),
    [("reward", "semantic", 199), ("penalty", "semantic", 200), ("finetune", "finetuning", 0)],
)
def test_losses_maps_and_gradients_agree_with_the_reference(name, stage, step, vector_unet, vectors):
    vector = vectors(name)
    inputs = step_inputs(vector)
    loss = loss_of(vector_unet, stage, inputs, active_term(SETTINGS, stage, step))
    for part in ("denoising", "prior", "attention", "total"):
        assert_agrees(getattr(loss, part), vector[f"expected_{part}_loss"])
    read = [attention_layers(vector_unet)[index].cross_index for index in loss.maps]
    expected = [key for key in vector if key.startswith("expected_attention_map_layer")]
    assert sorted(f"expected_attention_map_layer{number}" for number in read) == sorted(expected)
    for number, flat in zip(read, loss.maps.values(), strict=True):
        assert_agrees(flat[0], vector[f"expected_attention_map_layer{number}"].flatten(0, 1))
    (gradient,) = torch.autograd.grad(loss.total, inputs.encoder_hidden_states)
    assert_agrees(gradient, vector["expected_grad_encoder_hidden_states"], 1e-4)


@pytest.mark.parametrize(("timestep", "counts"), [(499, True), (500, False)])
def test_attention_counts_below_timestep_500_only(timestep, counts, vector_unet, instances):
    inputs = replace(instances, timesteps=torch.tensor([timestep, timestep]))
    loss = loss_of(vector_unet, "semantic", inputs, PENALTY)
    assert (loss.attention > 0) == counts
    torch.testing.assert_close(loss.total, loss.denoising + loss.attention)


@pytest.mark.parametrize(("timesteps", "counts"), [((900, 100), True), ((100, 900), False)])
def test_the_timestep_of_the_instance_opens_the_gate_not_that_of_the_class(
    timesteps, counts, vector_unet, instances
):
    inputs = replace(
        instances,
        timesteps=torch.tensor(timesteps),
        token_positions=instances.token_positions[1:],
        masks=instances.masks[1:],
        valid=instances.valid[1:],
    )
    loss = loss_of(vector_unet, "finetuning", inputs, PENALTY)
    assert (loss.attention > 0) == counts
    assert loss.prior > 0


def test_stage_two_is_the_class_sample_and_all_selected_instances(vector_unet, instances):
    class_sample, sample = rows(instances, 1), rows(instances, 0)
    both = replace(
        sample,
        **{
            name: torch.cat([getattr(class_sample, name), getattr(sample, name)])
            for name in ("latents", "noise", "timesteps", "encoder_hidden_states")
        },
    )
    loss = loss_of(vector_unet, "finetuning", both, PENALTY)

    noisy = SCHEDULE.add_noise(both.latents, both.noise, both.timesteps)
    prediction = vector_unet(noisy, both.timesteps, both.encoder_hidden_states).sample
    union = torch.zeros(32, 32)
    union[4:20, 4:20] = union[12:28, 8:24] = 1
    torch.testing.assert_close(loss.prior, F.mse_loss(prediction[0], both.noise[0]))
    torch.testing.assert_close(loss.denoising, F.mse_loss(prediction[1] * union, both.noise[1] * union))
    alone = [
        loss_of(vector_unet, "finetuning", one, PENALTY).attention
        for one in (
            rows(instances, 0, kept=1),
            replace(
                sample, token_positions=torch.tensor([[6]]), masks=sample.masks[:, 1:], valid=torch.ones(1, 1)
            ),
        )
    ]
    torch.testing.assert_close(loss.attention, sum(alone))


@pytest.mark.parametrize("term", ["reward", "penalty", "break_a_scene"])
def test_padding_changes_nothing_and_samples_are_averaged(term, vector_unet, instances):
    settings = TermSettings(AttentionTerm(term), 1.0)
    batch = loss_of(vector_unet, "semantic", instances, settings)
    first = loss_of(vector_unet, "semantic", rows(instances, 0), settings)
    second = loss_of(vector_unet, "semantic", rows(instances, 1, kept=1), settings)
    for part in ("denoising", "attention", "total"):
        torch.testing.assert_close(getattr(batch, part), (getattr(first, part) + getattr(second, part)) / 2)


def test_the_velocity_is_the_target_of_a_model_that_predicts_it(vector_unet, instances):
    velocity = replace(SCHEDULE, prediction_type="v_prediction")
    inputs = replace(instances, masks=torch.ones_like(instances.masks))
    loss = loss_of(vector_unet, "semantic", inputs, PENALTY, velocity)
    noisy = SCHEDULE.add_noise(inputs.latents, inputs.noise, inputs.timesteps)
    alpha = SCHEDULE.alphas_cumprod[inputs.timesteps][:, None, None, None]
    target = (alpha.sqrt() * noisy - inputs.latents) / (1 - alpha).sqrt()
    prediction = vector_unet(noisy, inputs.timesteps, inputs.encoder_hidden_states).sample
    torch.testing.assert_close(loss.denoising, F.mse_loss(prediction, target), rtol=1e-4, atol=1e-6)


def test_the_loss_is_one_graph_whatever_the_words_and_the_timesteps(vector_unet, instances):
    with AttentionRecorder(vector_unet, choose_layers(vector_unet).semantic) as recorder:
        compiled = torch.compile(semantic_loss, backend="eager", fullgraph=True)
        arguments = (PENALTY, SETTINGS.timestep_limit)
        compiled(vector_unet, recorder, SCHEDULE, instances, *arguments)
        other = replace(
            instances, timesteps=torch.tensor([700, 20]), token_positions=torch.tensor([[7, 5], [9, 3]])
        )
        with torch.compiler.set_stance("fail_on_recompile"):
            loss = compiled(vector_unet, recorder, SCHEDULE, other, *arguments)
    torch.testing.assert_close(loss.total, loss_of(vector_unet, "semantic", other, PENALTY).total)


def test_without_a_term_nothing_is_read(vector_unet, instances):
    loss = loss_of(vector_unet, "semantic", instances, TermSettings(AttentionTerm.none, 1.0))
    assert loss.maps == {}
    assert loss.attention == 0
