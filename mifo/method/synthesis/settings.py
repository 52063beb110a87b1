"""How pictures are sampled, whether or not boxes control them."""

from dataclasses import dataclass

from mifo.errors import MifoError


@dataclass
class SynthesisSettings:
    """Sampling by the model's process, DDIM or Euler, with classifier-free guidance (arXiv 2207.12598).

    Attributes:
        steps: denoising steps.
        guidance_scale: weight of the conditional over the unconditional prediction; 1 is no guidance.
        negative_prompt: the prompt of the unconditional half.
        samples: pictures made at once of one prompt.
    """

    steps: int = 50
    guidance_scale: float = 7.5
    negative_prompt: str = ""
    samples: int = 1


def check_synthesis(settings: SynthesisSettings) -> None:
    """Refuse impossible settings before any model is loaded.

    Raises:
        MifoError: naming the key and the values that it takes.
    """
    for key in ("steps", "samples"):
        if (value := getattr(settings, key)) < 1:
            raise MifoError(f"synthesis.{key}={value} makes no picture; take at least 1.")
