"""Deterministic DDIM sampling (arXiv 2010.02502, eq. 12 with η = 0)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mifo.errors import MifoError
from mifo.method.diffusion.noise_schedule import NoiseSchedule


def ddim_timesteps(steps: int, schedule: NoiseSchedule) -> list[int]:
    """The timesteps of a picture from high to low, those of diffusers' DDIMScheduler.

    20 of 1000 are with "leading" spacing 950, 900, …, 0, each plus the offset; with "trailing" 999, 949, …,
    49; with "linspace" 999, 946, …, 0.

    Raises:
        MifoError: fewer than one step or more than the schedule has timesteps.
    """
    length = len(schedule.alphas_cumprod)
    timesteps = _spaced(steps, length, schedule) if 1 <= steps <= length else []
    if not timesteps or timesteps[0] >= length:
        offset = schedule.steps_offset if schedule.timestep_spacing == "leading" else 0
        raise MifoError(
            f"{steps} sampling steps asked for, but the model's scheduler has {length} timesteps"
            f"{f' and the steps_offset {offset}' if offset else ''}; choose 1 to {length // (offset + 1)}."
        )
    return timesteps


def _spaced(steps: int, length: int, schedule: NoiseSchedule) -> list[int]:
    # a half is rounded by the last bit of these products, which are formed as in diffusers' calls of numpy
    if schedule.timestep_spacing == "linspace":
        stride = (length - 1) / max(steps - 1, 1)
        return [round(step * stride) for step in reversed(range(steps))]
    if schedule.timestep_spacing == "trailing":
        stride = (length - length / steps) - length
        return [round(length + step * stride) - 1 for step in range(steps)]
    return [step * (length // steps) + schedule.steps_offset for step in reversed(range(steps))]


def ddim_step(
    schedule: NoiseSchedule, noisy: Tensor, prediction: Tensor, timestep: int, next_timestep: int
) -> Tensor:
    """Go from x_t to the next, smaller timestep along the U-Net's prediction, without clipping.

    Args:
        schedule: the noise schedule, on the latents' device.
        noisy, prediction: (B, C, h, w).
        timestep: t, one of `ddim_timesteps`.
        next_timestep: t − T // steps, whatever the spacing; below 0 at the last step, which ends at ᾱ of
            timestep 0, or at one if the schedule's `set_alpha_to_one` says so.

    Returns:
        (B, C, h, w).
    """
    clean, noise = schedule.clean_and_noise(noisy, prediction, timestep)
    if next_timestep < 0 and schedule.set_alpha_to_one:
        return clean
    return schedule.add_noise(clean, noise, max(next_timestep, 0))


class DDIM(NoiseSchedule):
    """A noise schedule as the noise process of a model that is sampled by DDIM."""

    @property
    def length(self) -> int:
        return len(self.alphas_cumprod)

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.length, (count,), generator=generator)

    def share(self, time: Tensor) -> Tensor:
        """t / T."""
        return time / self.length

    def times(self, steps: int) -> list[int]:
        return ddim_timesteps(steps, self)

    def step(self, noisy: Tensor, prediction: Tensor, times: Sequence[int], step: int) -> Tensor:
        time = times[step]
        return ddim_step(self, noisy, prediction, time, time - self.length // len(times))
