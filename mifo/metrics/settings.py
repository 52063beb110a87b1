"""Settings of the measures: protocol, evaluators and crops."""

from dataclasses import dataclass, field
from enum import StrEnum


class Fit(StrEnum):
    """How a part of a picture becomes the square that an evaluator sees."""

    pad = "pad"  # centred on black
    stretch = "stretch"


class ClassWords(StrEnum):
    """The classes among which class accuracy chooses, together with the instances' own classes."""

    miniature = "miniature"  # the things of the miniature's drawings
    coco = "coco"  # the 80 categories of COCO


@dataclass
class ImageTextSettings:
    """The image–text evaluator, an open_clip model.

    `name` is `embedded` (the miniature's own), an open_clip architecture (`ViT-L-14`) or a schema name
    (`local-dir:FOLDER`, `hf-hub:ID`); `pretrained` is the weight tag that an architecture needs (`openai`).
    """

    name: str = "embedded"
    pretrained: str | None = None


@dataclass
class ImageSettings:
    """The image evaluator, a transformers ViT whose CLS feature is compared, or DreamSim.

    `source` is `embedded` (the miniature's own), a hub id (`facebook/dino-vitb16`), a folder, or `dreamsim`
    (the ensemble; `dreamsim:dino_vitb16` and the like for its single models); `image_size` is the side in
    pixels that crops are resized to, null for the model's own.
    """

    source: str = "embedded"
    revision: str | None = None
    image_size: int | None = None


@dataclass
class MetricsSettings:
    """`protocol` names the way of measuring; scores of different protocols never share a table."""

    protocol: str = "miniature"
    image_text: ImageTextSettings = field(default_factory=ImageTextSettings)
    image: ImageSettings = field(default_factory=ImageSettings)
    fit: Fit = Fit.pad
    class_words: ClassWords = ClassWords.miniature
    batch_size: int = 32  # pictures, crops or windows that an evaluator sees at once
    windows: int = 7  # box adherence looks at windows × windows positions for each box
