"""Rectified flow (arXiv 2209.03003, as Stable Diffusion 3 has it, 2403.03206): straight lines to noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from mifo.errors import MifoError


class Timesteps(StrEnum):
    """How the times of learning are drawn before they are shifted (arXiv 2403.03206, section 3.1)."""

    logit_normal = "logit_normal"
    uniform = "uniform"


@dataclass(frozen=True)
class Flow:
    """x_σ = (1 − σ)·x + σ·n; the network predicts the velocity n − x, and Euler's method follows it.

    Times are σ·length, as the network reads them.
    """

    shift: float = 1.0  # moves times towards noise, as larger pictures need it (arXiv 2403.03206, eq. 23)
    length: int = 1000  # the time of pure noise
    timesteps: Timesteps = Timesteps.logit_normal  # how times are drawn in learning
    even: bool = False  # sampling shifts the shares 1, 1 − 1/steps, …, 1/steps; Stable Diffusion 3 others
    shift_of: Callable[[int], float] | None = None  # the shift of a picture of so many steps; None: `shift`

    prediction_type = "velocity"

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """The times (count,) of a learning step."""
        if self.timesteps is Timesteps.uniform:
            return _shifted(torch.rand(count, generator=generator), self.shift) * self.length
        return _shifted(torch.randn(count, generator=generator).sigmoid(), self.shift) * self.length

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor | float) -> Tensor:
        """x_σ of (B, …) clean latents and noise at the times (B,), or at one for all."""
        sigma = self._sigma(time, clean)
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor | float) -> Tensor:
        """The velocity, the same at all times."""
        return noise - clean

    def share(self, time: Tensor) -> Tensor:
        """σ."""
        return time / self.length

    def times(self, steps: int) -> list[float]:
        """Those of diffusers' pipelines; Stable Diffusion 3's last time is shifted twice.

        Raises:
            MifoError: fewer than one step or more than the flow has timesteps.
        """
        if not 1 <= steps <= self.length:
            raise MifoError(
                f"{steps} sampling steps asked for, but the model's scheduler has {self.length} timesteps; "
                f"choose 1 to {self.length}."
            )
        shift = self.shift_of(steps) if self.shift_of else self.shift
        last = torch.tensor(1 / (steps if self.even else self.length), dtype=torch.float64)
        last = last if self.even else _shifted(last, shift)
        between = torch.linspace(1, last.item(), steps, dtype=torch.float64)
        return (_shifted(between, shift) * self.length).tolist()

    def step(self, noisy: Tensor, prediction: Tensor, times: Sequence[float], step: int) -> Tensor:
        """The latents (B, C, h, w) at the next of the `times`, or at 0 after the last."""
        further = times[step + 1] if step + 1 < len(times) else 0.0
        return noisy + (further - times[step]) / self.length * prediction

    def _sigma(self, time: Tensor | float, like: Tensor) -> Tensor:
        """σ shaped to multiply latents."""
        sigma = torch.as_tensor(time, device=like.device) / self.length
        return sigma.to(like.dtype).view(-1, *(1,) * (like.dim() - 1))


def _shifted(sigma: Tensor, shift: float) -> Tensor:
    return shift * sigma / (1 + (shift - 1) * sigma)
