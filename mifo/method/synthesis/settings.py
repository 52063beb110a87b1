"""How pictures are sampled, whether or not boxes control them."""

from dataclasses import dataclass

from mifo.errors import check_least


@dataclass
class SynthesisSettings:
    """Sampling by the model's process, DDIM or Euler, with classifier-free guidance (arXiv 2207.12598)."""

    steps: int = 50  # denoising steps
    guidance_scale: float = 7.5  # weight of the conditional over the unconditional prediction; 1: no guidance
    negative_prompt: str = ""  # the prompt of the unconditional half
    samples: int = 1  # pictures made at once of one prompt


def check_synthesis(settings: SynthesisSettings) -> None:
    """Refuse impossible settings before any model is loaded; see `check_least`."""
    check_least("synthesis", settings, steps=1, samples=1, guidance_scale=0)
