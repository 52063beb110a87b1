"""Deterministic DDIM sampling (arXiv 2010.02502, eq. 12 with η = 0)."""

from collections.abc import Sequence

from torch import Tensor

from mifo.errors import MifoError
from mifo.method.diffusion.noise_schedule import NoiseSchedule


def ddim_timesteps(steps: int, schedule: NoiseSchedule, offset: int = 0) -> list[int]:
    """The "leading" timesteps, evenly spaced from high to `offset`: 20 of 1000 are 950, 900, …, 0.

    Raises:
        MifoError: fewer than one step or more than the schedule has timesteps.
    """
    length = len(schedule.alphas_cumprod)
    if not 1 <= steps <= length - offset:
        raise MifoError(f"{steps} sampling steps asked for; choose 1 to {length - offset}.")
    stride = length // steps
    return [step * stride + offset for step in reversed(range(steps))]


def ddim_step(
    schedule: NoiseSchedule, noisy: Tensor, prediction: Tensor, timestep: int, next_timestep: int
) -> Tensor:
    """Go from x_t to the next, smaller timestep along the U-Net's prediction, without clipping.

    Args:
        schedule: the noise schedule, on the latents' device.
        noisy, prediction: (B, C, h, w).
        timestep: t, one of `ddim_timesteps`.
        next_timestep: t − T // steps; below 0 at the last step, which ends at ᾱ of timestep 0, not at one.

    Returns:
        (B, C, h, w).
    """
    clean, noise = schedule.clean_and_noise(noisy, prediction, timestep)
    return schedule.add_noise(clean, noise, max(next_timestep, 0))


class DDIM(NoiseSchedule):
    """A noise schedule as the noise process of a model that is sampled by DDIM."""

    @property
    def length(self) -> int:
        return len(self.alphas_cumprod)

    def share(self, time: Tensor) -> Tensor:
        """t / T."""
        return time / self.length

    def times(self, steps: int) -> list[int]:
        return ddim_timesteps(steps, self)

    def step(self, noisy: Tensor, prediction: Tensor, times: Sequence[int], step: int) -> Tensor:
        time = times[step]
        return ddim_step(self, noisy, prediction, time, time - self.length // len(times))
