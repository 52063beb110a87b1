"""The noise process of Stable Diffusion 1.x, 2.x and XL, sampled by deterministic DDIM.

Notation of DDPM (arXiv 2006.11239): x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε, with ᾱ = `alphas_cumprod`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mifo.errors import MifoError

PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class DDIM:
    """A noise schedule of T timesteps, what the network predicts on it, and where pictures are sampled.

    Refuses another prediction type, spacing or offset than it knows.
    """

    alphas_cumprod: Tensor  # ᾱ by timestep, (T,), on the device of the latents
    prediction_type: str = "epsilon"  # or "v_prediction": √ᾱ·ε − √(1 − ᾱ)·x_0, arXiv 2202.00512
    timestep_spacing: str = "leading"  # or "trailing" or "linspace", see `times`
    steps_offset: int = 0  # added to "leading" timesteps
    set_alpha_to_one: bool = False  # the last step ends at ᾱ = 1, a clean picture, not at ᾱ of timestep 0

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise MifoError(
                f"The scheduler's prediction_type is {self.prediction_type!r}; "
                f"use a model that predicts {' or '.join(PREDICTION_TYPES)}."
            )
        if self.timestep_spacing not in SPACINGS:
            raise MifoError(
                f"The scheduler's timestep_spacing is {self.timestep_spacing!r}; "
                f"set {', '.join(SPACINGS[:-1])} or {SPACINGS[-1]} in scheduler/scheduler_config.json."
            )
        if type(self.steps_offset) is not int or self.steps_offset < 0:
            raise MifoError(
                f"The scheduler's steps_offset is {self.steps_offset!r}; "
                "set a whole number from 0 in scheduler/scheduler_config.json."
            )

    @property
    def length(self) -> int:
        return len(self.alphas_cumprod)

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.length, (count,), generator=generator)

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor | int) -> Tensor:
        """x_t of clean latents x_0 and noise ε, (B, …), at the timesteps (B,), or at one for all."""
        signal, spread = self._coefficients(time, clean)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor | int) -> Tensor:
        """What the network is to predict for clean latents and noise (B, …) at the timesteps."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._coefficients(time, clean)
        return signal * noise - spread * clean

    def clean_and_noise(self, noisy: Tensor, prediction: Tensor, time: Tensor | int) -> tuple[Tensor, Tensor]:
        """x_0 and ε that a prediction for noisy latents (B, …) implies at the timesteps."""
        signal, spread = self._coefficients(time, noisy)
        if self.prediction_type == "epsilon":
            return (noisy - spread * prediction) / signal, prediction
        return signal * noisy - spread * prediction, signal * prediction + spread * noisy

    def share(self, time: Tensor) -> Tensor:
        """t / T."""
        return time / self.length

    def times(self, steps: int) -> list[int]:
        """The timesteps of a picture from high to low, those of diffusers' DDIMScheduler.

        20 of 1000 are with "leading" spacing 950, 900, …, 0, each plus the offset; with "trailing" 999, 949,
        …, 49; with "linspace" 999, 946, …, 0.

        Raises:
            MifoError: fewer than one step or more than the schedule has timesteps.
        """
        timesteps = self._spaced(steps) if 1 <= steps <= self.length else []
        if not timesteps or timesteps[0] >= self.length:
            offset = self.steps_offset if self.timestep_spacing == "leading" else 0
            raise MifoError(
                f"{steps} sampling steps asked for, but the model's scheduler has {self.length} timesteps"
                f"{f' and the steps_offset {offset}' if offset else ''}; choose 1 to "
                f"{self.length // (offset + 1)}."
            )
        return timesteps

    def step(self, noisy: Tensor, prediction: Tensor, times: Sequence[int], step: int) -> Tensor:
        """Go from x_t to the next, smaller timestep (arXiv 2010.02502, eq. 12 with η = 0), without clipping.

        The next timestep is t − T // steps, whatever the spacing. The last step, where this is below 0, ends
        at ᾱ of timestep 0, or at ᾱ = 1 if `set_alpha_to_one` says so.
        """
        following = times[step] - self.length // len(times)
        clean, noise = self.clean_and_noise(noisy, prediction, times[step])
        if following < 0 and self.set_alpha_to_one:
            return clean
        return self.add_noise(clean, noise, max(following, 0))

    def _spaced(self, steps: int) -> list[int]:
        # the last bit of these products decides how a half is rounded: they are formed as in diffusers
        if self.timestep_spacing == "linspace":
            stride = (self.length - 1) / max(steps - 1, 1)
            return [round(step * stride) for step in reversed(range(steps))]
        if self.timestep_spacing == "trailing":
            stride = (self.length - self.length / steps) - self.length
            return [round(self.length + step * stride) - 1 for step in range(steps)]
        return [step * (self.length // steps) + self.steps_offset for step in reversed(range(steps))]

    def _coefficients(self, time: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t), shaped to multiply latents."""
        alpha = self.alphas_cumprod[time].view(-1, *(1,) * (like.dim() - 1))
        return alpha.sqrt().to(like.dtype), (1 - alpha).sqrt().to(like.dtype)
