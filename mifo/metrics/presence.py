"""Is every instance there, and there once? Crops are matched to instances one to one.

Means over crops forgive a lost instance: of ten things nine may be perfect. These two count pictures.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mifo.metrics.metric import Features, Metric
from mifo.metrics.similarity import similarity_matrix

PRESENT = 0.5
"""Least cosine of a crop that shows an instance. For the miniature's ViT, whose cosine is exp(−(d/0.12)²) for
drawings that differ by d, that is d = 0.1, and two things of a drawn scene differ by 0.14 or more."""


def match(similarity: Tensor) -> Tensor:
    """The instance of each crop (C,), one to one, with the largest sum of cosines (C, C)."""
    return torch.from_numpy(linear_sum_assignment(similarity.cpu().numpy(), maximize=True)[1])


class Missing(Metric):
    """Share of pictures in which an instance of the prompt is in no box: [0, 1], lower is better.

    An instance is missing when the crop that is matched to it does not show it, so that instances in each
    other's boxes count as there.
    """

    higher_is_better = False

    @staticmethod
    def inputs(picture: Features) -> tuple[Tensor, ...] | None:
        """Cosines of one picture's crops with the instances that it should show, (1, C, C)."""
        if picture.crops is None or picture.boxes is None:
            return None
        return (similarity_matrix(picture.crops, picture.references[picture.own])[None],)

    def update(self, similarity: Tensor) -> None:
        """Take (B, C, C)."""
        for each in similarity:
            super().update(float((_matched(each) < PRESENT).any()))


class Twice(Metric):
    """Share of pictures in which an instance is in two boxes or more: [0, 1], lower is better.

    A crop is a second of an instance when it shows it, is matched to another, and resembles that one less.
    """

    higher_is_better = False
    inputs = staticmethod(Missing.inputs)

    def update(self, similarity: Tensor) -> None:
        """Take (B, C, C)."""
        for each in similarity:
            second = (each >= PRESENT) & (each > _matched(each)[:, None])
            # a crop that resembles two instances is a second of the nearest alone, and of one that is there
            second &= torch.nn.functional.one_hot(each.argmax(1), each.shape[1]).bool()
            super().update(float(second.any()))


def _matched(similarity: Tensor) -> Tensor:
    """The cosine of each crop with the instance that it is matched to, (C,)."""
    return similarity.gather(1, match(similarity).to(similarity.device)[:, None])[:, 0]
