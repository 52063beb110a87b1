"""How noise is added, what the U-Net is asked to predict, and what its answer says about the picture.

Notation of DDPM (arXiv 2006.11239): x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε, with ᾱ = `alphas_cumprod`.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mifo.errors import MifoError

PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class NoiseSchedule:
    """A noise schedule, what the U-Net predicts on it, and at which timesteps pictures are sampled.

    Attributes:
        alphas_cumprod: ᾱ by timestep, (T,), on the device of the latents.
        prediction_type: "epsilon" (the noise) or "v_prediction" (√ᾱ·ε − √(1 − ᾱ)·x_0, arXiv 2202.00512).
        timestep_spacing: "leading", "trailing" or "linspace", see `ddim_timesteps`.
        steps_offset: added to "leading" timesteps.
        set_alpha_to_one: the last step ends at ᾱ = 1, a clean picture, in place of ᾱ of timestep 0.

    Raises:
        MifoError: another prediction type, spacing or offset.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = False

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

    @classmethod
    def from_scheduler(cls, scheduler: Any, device: torch.device | str = "cpu") -> Self:
        """Take over a diffusers scheduler whose betas were computed on the CPU.

        Raises:
            MifoError: the scheduler clips or thresholds samples; its betas do not fit its timesteps; or its
                last timestep is pure noise, where a prediction of the noise tells nothing of the picture.
        """
        config, alphas = scheduler.config, scheduler.alphas_cumprod
        for key in ("clip_sample", "thresholding"):
            if config.get(key):
                raise MifoError(
                    f"The scheduler's {key} is true, which is for pictures and not for latents; "
                    f"set {key} to false in scheduler/scheduler_config.json."
                )
        if len(alphas) != config.num_train_timesteps:
            raise MifoError(
                f"The scheduler has {len(alphas)} betas, but num_train_timesteps is "
                f"{config.num_train_timesteps}; correct scheduler/scheduler_config.json."
            )
        if config.prediction_type == "epsilon" and alphas[-1] == 0:
            raise MifoError(
                "The scheduler's last timestep is pure noise (rescale_betas_zero_snr), which a model of "
                "prediction_type epsilon cannot start from; use a model that predicts v_prediction."
            )
        return cls(
            alphas.to(device),
            config.prediction_type,
            config.get("timestep_spacing", "leading"),
            config.get("steps_offset", 0),
            config.get("set_alpha_to_one", False),
        )

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
