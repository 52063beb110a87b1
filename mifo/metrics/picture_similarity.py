"""The published measure of whole pictures, to compare: it needs no boxes, and cannot see who is where."""

from torch import Tensor

from mifo.metrics.metric import Features, Metric
from mifo.metrics.similarity import similarity_matrix


class PictureSimilarity(Metric):
    """Mean cosine (CLIP-I) of the picture with each instance that it should show: [−1, 1], higher is better.

    As multi-subject methods report it, among them MOSAIC (arXiv 2509.01977) and MultiCrafter (2509.21953).
    """

    encoder = "image_text"

    @staticmethod
    def inputs(picture: Features) -> tuple[Tensor, ...] | None:
        if not len(picture.own):
            return None
        return picture.whole_clip, picture.references_clip[picture.own]

    def update(self, pictures: Tensor, references: Tensor) -> None:
        """Take features of pictures (B, D) and of the instances that all of them should show (N, D)."""
        super().update(similarity_matrix(pictures, references).mean(1))
