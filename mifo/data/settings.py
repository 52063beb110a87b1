"""Which image and which of its instances are learned."""

from dataclasses import dataclass
from typing import Any


@dataclass
class InstancesSettings:
    """Either a `folder` with `img.*`, `mask0.png`, `mask1.png`, … or a drawn `scene` of the miniature."""

    name: str = "instances"  # this and "local" give way to the name of the folder in titles
    folder: str | None = None
    scene: dict[str, Any] | None = None  # the fields of `mifo.world.scenes.SceneSpec`
    fit: str = "squash"  # a picture that is not square: squash | crop (about the instances) | pad
    class_names: list[str] | None = None  # one word or phrase per instance, "car"; None: not known
    initializers: list[str | None] | None = None  # a word per instance whose embedding its token starts from
