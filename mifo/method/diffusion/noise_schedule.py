"""How noise is added, what the U-Net is asked to predict, and what its answer says about the picture.

Notation of DDPM (arXiv 2006.11239): x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε, with ᾱ = `alphas_cumprod`.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mifo.errors import MifoError

PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class NoiseSchedule:
    """A noise schedule and what the U-Net predicts on it.

    Attributes:
        alphas_cumprod: ᾱ by timestep, (T,), on the device of the latents.
        prediction_type: "epsilon" (the noise) or "v_prediction" (√ᾱ·ε − √(1 − ᾱ)·x_0, arXiv 2202.00512).

    Raises:
        MifoError: another prediction type.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise MifoError(
                f"The scheduler's prediction_type is {self.prediction_type!r}; "
                f"use a model that predicts {' or '.join(PREDICTION_TYPES)}."
            )

    @classmethod
    def from_scheduler(cls, scheduler: Any, device: torch.device | str = "cpu") -> Self:
        """Take the betas and the prediction type of a diffusers scheduler."""
        return cls(scheduler.alphas_cumprod.to(device), scheduler.config.prediction_type)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """x_t of (B, …) clean latents x_0 and noise ε at the timesteps (B,), or at one for all."""
        signal, spread = self._coefficients(timesteps, clean)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """What to predict for (B, …) clean latents and noise at the timesteps (B,), or at one for all."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._coefficients(timesteps, clean)
        return signal * noise - spread * clean

    def clean_and_noise(
        self, noisy: Tensor, prediction: Tensor, timesteps: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """(x_0, ε) that a prediction for noisy latents (B, …) implies at the timesteps (B,), or at one."""
        signal, spread = self._coefficients(timesteps, noisy)
        if self.prediction_type == "epsilon":
            return (noisy - spread * prediction) / signal, prediction
        return signal * noisy - spread * prediction, signal * prediction + spread * noisy

    def _coefficients(self, timesteps: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t), shaped to multiply latents."""
        alpha = self.alphas_cumprod[timesteps].view(-1, *(1,) * (like.dim() - 1))
        return alpha.sqrt().to(like.dtype), (1 - alpha).sqrt().to(like.dtype)
