"""Box adherence: is each instance found where its box is?"""

import math

from torch import Tensor
from torchvision.ops import box_iou

from mifo.metrics.crops import Box, crop_box
from mifo.metrics.evaluators import ImageEncoder
from mifo.metrics.metric import Features, Metric
from mifo.metrics.similarity import similarity_matrix


class BoxAdherence(Metric):
    """Mean IoU of each box with the window where its instance was found: [0, 1], higher is better."""

    @staticmethod
    def inputs(picture: Features) -> tuple[Tensor, ...] | None:
        return None if picture.found is None or picture.boxes is None else (picture.found, picture.boxes)

    def update(self, found: Tensor, boxes: Tensor) -> None:
        """Take found windows and boxes, both (C, 4) as [x0, y0, x1, y1]."""
        super().update(box_iou(found, boxes).diagonal())


def find_instance(image: Tensor, reference: Tensor, box: Box, encoder: ImageEncoder, windows: int) -> Box:
    """Return the window of `image` (3, H, W) in [0, 1] that is most similar to the feature `reference` (D,).

    The windows are the box itself and windows of its size at windows × windows even places over the picture;
    the box wins ties. No detector or segmenter is needed, and look-alikes are told apart; extent is not
    measured, only place. NaN four times where a feature is not finite.
    """
    width, height = box[2] - box[0], box[3] - box[1]
    places = [index / max(windows - 1, 1) for index in range(windows)]
    candidates: list[Box] = [
        tuple(box),
        *(
            (x * (1 - width), y * (1 - height), x * (1 - width) + width, y * (1 - height) + height)
            for y in places
            for x in places
        ),
    ]
    features = encoder.encode_images([crop_box(image, candidate) for candidate in candidates])
    similarity = similarity_matrix(features, reference[None])[:, 0]
    return candidates[int(similarity.argmax())] if similarity.isfinite().all() else (math.nan,) * 4
