"""The weight α of MIFO's penalty on the background, and the step size η of the descent."""

import math


def penalty_weight(counter: int) -> float:
    """α after `counter` earlier readings, MIFO's schedule (arXiv 2511.00542): a line, then half a cosine.

    The counter starts at 0, runs on across denoising steps and is read twice an iteration, once for the
    cross- and once for the self-attention part. With τ = ⌊counter / 10⌋:

        τ ≤ 3:   0.4 + (0.1 − 0.4)·(τ − 1)/2
        τ ≥ 15:  0.01
        else:    0.01 + (0.1 − 0.01)·(1 + cos(π·(τ − 3)/12))/2
    """
    tau = counter // 10
    if tau <= 3:
        return 0.4 + (0.1 - 0.4) * (tau - 1) / 2
    if tau >= 15:
        return 0.01
    return 0.01 + (0.1 - 0.01) * (1 + math.cos(math.pi * (tau - 3) / 12)) / 2


def penalty_weights(counter: int, scale: float = 1.0) -> tuple[tuple[float, float], int]:
    """α of an iteration's cross and self part, times `scale`, and the counter after both readings."""
    return (scale * penalty_weight(counter), scale * penalty_weight(counter + 1)), counter + 2


def step_size(step: int, guided_steps: int, start: float, end: float) -> float:
    """η of a denoising step counted from 0: start + (end − start)·step/guided_steps (arXiv 2403.16990)."""
    return start + (end - start) * step / guided_steps
