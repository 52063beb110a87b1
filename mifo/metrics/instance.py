"""Metrics of the similarity matrix: rows are box crops of made pictures, columns the source's instances.

Each `update` takes crop features (C, D), reference features (N, D) of ONE source image, and `own` (C,), the
index of the instance that each crop should show. Crops of other sources come in other updates. Features need
no normalisation.
"""

import torch
from torch import Tensor

from mifo.metrics.metric import Features, Metric
from mifo.metrics.similarity import mixing_shares, similarity_matrix


class InstanceConsistency(Metric):
    """Mean cosine of each crop with its own instance: [−1, 1], higher is better.

    It stands in for Break-a-Scene's identity similarity (arXiv 2305.16311, section 4); a box crop replaces
    their class segmenter, which cannot tell look-alikes apart.
    """

    @staticmethod
    def inputs(picture: Features) -> tuple[Tensor, ...] | None:
        return None if picture.crops is None else (picture.crops, picture.references, picture.own)

    def update(self, crops: Tensor, references: Tensor, own: Tensor) -> None:
        similarity = similarity_matrix(crops, references)
        super().update(similarity.gather(1, own[:, None]))


class InstanceConsistencyClip(InstanceConsistency):
    """The same by features of CLIP."""

    encoder = "image_text"

    @staticmethod
    def inputs(picture: Features) -> tuple[Tensor, ...] | None:
        if picture.crops_clip is None:
            return None
        return picture.crops_clip, picture.references_clip, picture.own


class Identification(Metric):
    """Share of crops whose most similar instance is their own: [0, 1], higher is better."""

    @staticmethod
    def inputs(picture: Features) -> tuple[Tensor, ...] | None:
        """One instance alone cannot be taken for another."""
        return InstanceConsistency.inputs(picture) if len(picture.references) > 1 else None

    def update(self, crops: Tensor, references: Tensor, own: Tensor) -> None:
        super().update((similarity_matrix(crops, references).argmax(dim=1) == own).float())


class Leakage(Metric):
    """Mean share of OTHER instances in a crop, 1 − share_own of `mixing_shares`: [0, 1], lower is better.

    0: each crop holds its own instance alone. 1: every crop holds others (instances swapped). A crop half of
    one and half of another scores 0.5.
    """

    higher_is_better = False

    inputs = staticmethod(Identification.inputs)

    def update(self, crops: Tensor, references: Tensor, own: Tensor) -> None:
        super().update(1 - mixing_shares(crops, references).gather(1, own[:, None]))


def leakage_matrix(crops: Tensor, references: Tensor, own: Tensor) -> Tensor:
    """Return the mean shares (N, N): row i = crops that should show instance i; NaN where there are none."""
    shares = mixing_shares(crops, references)
    return torch.stack([shares[own == index].mean(dim=0) for index in range(len(references))])
