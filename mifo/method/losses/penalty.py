"""MIFO's penalty, which only forbids a word to attend outside its instance (arXiv 2511.00542)."""

from torch import Tensor


def penalty(attention: Tensor, mask: Tensor) -> Tensor:
    """Mean over the map of (A·(1 − M))²; inside the mask the word attends as it likes and stays editable.

    Args:
        attention: cross-attention probabilities A of one token, mean over heads, (…, R, R) in [0, 1].
        mask: the instance's mask M at that resolution, (…, R, R) in [0, 1].

    Returns:
        (…), one loss per map.
    """
    return (attention * (1 - mask)).square().mean((-2, -1))
