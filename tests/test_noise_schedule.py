"""The noise schedule, the denoising loss and DDIM against diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch.nn import functional as F

from mifo.backbones.schedulers import ddim_of
from mifo.errors import MifoError
from mifo.method.objective import denoising_loss

BETAS = ("scaled_linear", "linear", "squaredcos_cap_v2")


def scheduler_of(prediction_type: str, betas: str = "scaled_linear", offset: int = 0) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=betas,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=offset,
        prediction_type=prediction_type,
    )


@pytest.fixture
def latents():
    return torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("betas", BETAS)
def test_noise_and_velocity_equal_those_of_diffusers(betas, latents):
    scheduler = scheduler_of("v_prediction", betas)
    process = ddim_of(scheduler)
    clean, noise, timesteps = latents[0], latents[1], torch.tensor([7, 800])
    torch.testing.assert_close(
        process.add_noise(clean, noise, timesteps), scheduler.add_noise(clean, noise, timesteps)
    )
    torch.testing.assert_close(
        process.target(clean, noise, timesteps), scheduler.get_velocity(clean, noise, timesteps)
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_back_picture_and_noise(prediction_type, latents):
    process = ddim_of(scheduler_of(prediction_type))
    clean, noise, timesteps = latents[0], latents[1], torch.tensor([7, 600])
    noisy = process.add_noise(clean, noise, timesteps)
    found = process.clean_and_noise(noisy, process.target(clean, noise, timesteps), timesteps)
    torch.testing.assert_close(found, (clean, noise), rtol=1e-4, atol=1e-4)


def test_latents_in_half_precision_stay_so(latents):
    process = ddim_of(scheduler_of("epsilon"))
    noisy = process.add_noise(latents[0].half(), latents[1].half(), torch.tensor([7, 600]))
    assert noisy.dtype == torch.float16


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize(
    ("prediction_type", "rescale"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
@pytest.mark.parametrize(
    ("spacing", "offset"), [("leading", 0), ("leading", 1), ("leading", 40), ("trailing", 1), ("linspace", 1)]
)
def test_ddim_equals_diffusers_to_its_last_step(
    spacing, offset, prediction_type, rescale, set_alpha_to_one, latents
):
    scheduler = DDIMScheduler.from_config(
        scheduler_of(prediction_type, offset=offset).config,
        timestep_spacing=spacing,
        rescale_betas_zero_snr=rescale,
        set_alpha_to_one=set_alpha_to_one,
    )
    process = ddim_of(scheduler)
    for steps in (1, 7, 20):
        scheduler.set_timesteps(steps)
        timesteps = process.times(steps)
        assert timesteps == scheduler.timesteps.tolist()
        ours = theirs = latents[0].double()
        for step, timestep in enumerate(timesteps):
            ours = process.step(ours, torch.sin(3 * ours), timesteps, step)
            theirs = scheduler.step(torch.sin(3 * theirs), timestep, theirs).prev_sample
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers_for_every_number_of_steps(spacing):
    scheduler = DDIMScheduler.from_config(scheduler_of("epsilon").config, timestep_spacing=spacing)
    process = ddim_of(scheduler)
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        # for some numbers diffusers adds one step too many, at the timestep -1
        assert process.times(steps) == scheduler.timesteps.tolist()[:steps]


@pytest.mark.parametrize(("steps", "offset", "most"), [(0, 0, 1000), (1001, 0, 1000), (1000, 1, 500)])
def test_impossible_numbers_of_steps_are_refused(steps, offset, most):
    process = ddim_of(scheduler_of("epsilon", offset=offset))
    with pytest.raises(MifoError, match=f"{steps} sampling steps .* choose 1 to {most}"):
        process.times(steps)
    assert process.times(most)[0] == 999


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"clip_sample": True}, "clip_sample is true"),
        ({"thresholding": True}, "thresholding is true"),
        ({"rescale_betas_zero_snr": True}, "pure noise .* prediction_type epsilon"),
        ({"timestep_spacing": "karras"}, "timestep_spacing is 'karras'; set leading, trailing or linspace"),
        ({"steps_offset": -1}, "steps_offset is -1"),
        ({"trained_betas": [0.1, 0.2]}, "2 betas, but num_train_timesteps is 1000"),
    ],
)
def test_what_the_sampler_does_not_do_is_refused(changes, reason):
    scheduler = DDIMScheduler.from_config(scheduler_of("epsilon").config, **changes)
    with pytest.raises(MifoError, match=reason):
        ddim_of(scheduler)


def test_prediction_of_the_picture_itself_is_refused():
    with pytest.raises(MifoError, match="prediction_type is 'sample'"):
        ddim_of(scheduler_of("sample"))


def test_time_is_told_as_a_share_of_the_whole():
    process = ddim_of(scheduler_of("v_prediction"))
    assert process.length == 1000
    assert process.share(torch.tensor([0, 500, 999])).tolist() == pytest.approx([0.0, 0.5, 0.999])


def test_masked_loss_is_averaged_over_all_elements(latents):
    prediction, target = latents[0], latents[1]
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :2] = 1
    inside = F.mse_loss(prediction[..., :2], target[..., :2])
    torch.testing.assert_close(denoising_loss(prediction, target, mask), inside * 2 / 8)
    torch.testing.assert_close(denoising_loss(prediction, target), F.mse_loss(prediction, target))
