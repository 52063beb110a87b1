"""The base class of metrics: a mean over crops or pictures, and the features of a picture that it reads."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torchmetrics import MeanMetric


@dataclass(frozen=True)
class Features:
    """The features of one picture: `…_clip` by the image–text encoder, the others by the image encoder."""

    whole_clip: Tensor  # the picture, (1, D)
    prompt_clip: Tensor  # its prompt, (1, D)
    crops: Tensor | None  # C crops, (C, D); None where the picture has no crops
    crops_clip: Tensor | None
    whole_crops_clip: Tensor | None  # of each crop's `whole_window`, (C, D); None without boxes
    own: Tensor  # (C,), the index of the instance that each crop should show
    references: Tensor  # the N instances of the source image, (N, D)
    references_clip: Tensor
    texts_clip: Tensor  # the W texts of classes, (W, D)
    classes: list[int | None]  # N places among those texts, of each instance's class; None: not known
    boxes: Tensor | None  # where the instances should be, (C, 4); None without boxes
    found: Tensor | None  # where they are, (C, 4)


class Metric(MeanMetric):
    """A mean that declares its encoder and the features of a picture that it reads.

    Its range stands in `mifo.metrics.scores.RANGES`. At first it is better when it is higher.
    """

    encoder: ClassVar[Literal["image", "image_text"]] = "image"
    higher_is_better = True

    @staticmethod
    def inputs(picture: Features) -> tuple[Tensor, ...] | None:
        """The arguments of `update` for a picture, one row a crop or picture; None: it cannot be measured."""
        raise NotImplementedError
