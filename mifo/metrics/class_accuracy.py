"""Class accuracy: is what stands in a box still a thing of its instance's class?

Identification and leakage compare instances with each other and forgive a lost class: a boat that has become
a balloon is told from other boats easily.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mifo.method.prompts.articles import article
from mifo.metrics.crops import Box
from mifo.metrics.metric import Features, Metric
from mifo.metrics.settings import ClassWords
from mifo.metrics.similarity import similarity_matrix
from mifo.world.vocabulary import THINGS


class ClassAccuracy(Metric):
    """Share of crops whose most similar text is that of their own class: [0, 1], higher is better.

    Zero-shot classification as in CLIP (arXiv 2103.00020, section 3.1), with one text a class.
    """

    encoder = "image_text"

    @staticmethod
    def inputs(picture: Features) -> tuple[Tensor, ...] | None:
        """Crops of instances whose class is known."""
        return _of_known_classes(picture, picture.crops_clip)

    def update(self, crops: Tensor, texts: Tensor, own: Tensor) -> None:
        """Take features of crops (C, D) and of texts (W, D), and the index of each crop's text (C,)."""
        super().update((similarity_matrix(crops, texts).argmax(dim=1) == own).float())


class ClassAccuracyWhole(ClassAccuracy):
    """Class accuracy in the `whole_window` of each crop, for things that stand partly outside their boxes."""

    @staticmethod
    def inputs(picture: Features) -> tuple[Tensor, ...] | None:
        return _of_known_classes(picture, picture.whole_crops_clip)


def whole_window(box: Box, found: Box) -> Box:
    """The smallest window that holds a box and where its instance was found; the box, if they are apart."""
    overlap = max(box[0], found[0]) < min(box[2], found[2]) and max(box[1], found[1]) < min(box[3], found[3])
    if not overlap:  # what was found is another's, or not finite
        return box
    return min(box[0], found[0]), min(box[1], found[1]), max(box[2], found[2]), max(box[3], found[3])


def _of_known_classes(picture: Features, crops: Tensor | None) -> tuple[Tensor, ...] | None:
    known = [place for place, own in enumerate(picture.own) if picture.classes[own] is not None]
    if not known or crops is None:
        return None
    wanted = torch.tensor([picture.classes[own] for own in picture.own[known]])
    return crops[known], picture.texts_clip, wanted


def class_texts(words: ClassWords, class_names: Sequence[str | None]) -> tuple[list[str], list[int | None]]:
    """Return the texts to choose from, and the place among them of each instance's own.

    The choice is among `words` and the instances' own classes; an instance whose class is not known has no
    place. A class beside its synonym in the list ("kitten", "cat") is judged too strictly.
    """
    names = list(dict.fromkeys((*_LISTS[words](), *(name for name in class_names if name))))
    places = [names.index(name) if name else None for name in class_names]
    return [f"a photo of {article(name)} {name}" for name in names], places


def _coco() -> list[str]:
    # takes a second, and photographs alone need it
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    return [name for name in names if name not in ("__background__", "N/A")]


_LISTS = {ClassWords.miniature: lambda: THINGS, ClassWords.coco: _coco}
