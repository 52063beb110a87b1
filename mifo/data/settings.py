"""Which image and which of its instances are learned, and what a learning step draws of them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class InstancesSettings:
    """Either a `folder` with `img.*`, `mask0.png`, `mask1.png`, … or a drawn `scene` of the miniature."""

    name: str = "instances"  # this and "local" give way to the name of the folder in titles
    folder: str | None = None
    # the fields of `mifo.world.spec.SceneSpec`, or of `mifo.world.drawn.DrawnSettings`
    scene: dict[str, Any] | None = None
    fit: str = "squash"  # a picture that is not square: squash | crop (about the instances) | pad
    class_names: list[str] | None = None  # one word or phrase per instance, "car"; None: not known
    initializers: list[str | None] | None = None  # a word per instance whose embedding its token starts from


@dataclass
class PriorSettings:
    """Prior preservation (DreamBooth, arXiv 2208.12242, eq. 2) of the second stage."""

    weight: float = 1.0  # of the loss on the class pictures; 0 leaves them out
    pictures: int = 100  # in all, shared out among the class prompts
    # {class} becomes "a car", "an apple": the class of each instance in turn
    prompts: list[str] = field(default_factory=lambda: ["a photo of {class}"])
    folder: str | None = None  # pictures of one's own, used instead of pictures made by the base model
    cache: str | None = None  # where made pictures are kept; None: the user's cache folder
    steps: int = 50  # sampling steps of a made picture
    guidance_scale: float = 7.5
    batch_size: int | None = None  # pictures made at once; None: what suits the device


@dataclass
class DrawSettings:
    """What a learning step draws."""

    prior: PriorSettings = field(default_factory=PriorSettings)
    template: str = "a photo of {}"  # {} becomes "<asset0> and <asset2>"
    union_sampling: bool = True  # False: all instances in their order at every step
    flip_probability: float = 0.5  # mirror image, left-right; 0 keeps text on objects readable
