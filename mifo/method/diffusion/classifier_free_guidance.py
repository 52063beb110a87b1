"""Classifier-free guidance (arXiv 2207.12598)."""

from torch import Tensor


def classifier_free_guidance(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """ε̂ = ε̂(∅) + scale · (ε̂(prompt) − ε̂(∅)), for predictions of one shape; scale 1 is the prompt's alone."""
    return unconditional + scale * (conditional - unconditional)
