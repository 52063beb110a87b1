"""The base class of metrics: a mean over crops or pictures, and the features of a picture that it reads."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torchmetrics import MeanMetric


@dataclass(frozen=True)
class Features:
    """The features of one picture: `…_clip` by the image–text encoder, the others by the image encoder.

    Attributes:
        whole_clip, prompt_clip: the picture and its prompt, (1, D).
        crops, crops_clip: C crops, (C, D); None where the picture has no crops.
        own: (C,), the index of the instance that each crop should show.
        references, references_clip: the N instances of the source image, (N, D).
        texts_clip: the W texts of classes, (W, D).
        classes: the place among those texts of each instance's class, N; None: not known.
        boxes, found: where the instances should be and where they are, (C, 4); None without boxes.
    """

    whole_clip: Tensor
    prompt_clip: Tensor
    crops: Tensor | None
    crops_clip: Tensor | None
    own: Tensor
    references: Tensor
    references_clip: Tensor
    texts_clip: Tensor
    classes: list[int | None]
    boxes: Tensor | None
    found: Tensor | None


class Metric(MeanMetric):
    """A mean that declares its encoder and the features of a picture that it reads.

    Attributes:
        encoder: whose features it compares.
        higher_is_better, plot_lower_bound, plot_upper_bound: its direction and its range; at first those of a
            share that should be large.
    """

    encoder: ClassVar[Literal["image", "image_text"]] = "image"
    higher_is_better = True
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    @staticmethod
    def inputs(picture: Features) -> tuple[Tensor, ...] | None:
        """The arguments of `update` for a picture, one row a crop or picture; None: it cannot be measured."""
        raise NotImplementedError
