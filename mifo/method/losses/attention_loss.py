"""The base class of losses on attention: which sites a loss reads, and its value for each instance."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from torch import Tensor

from mifo.errors import MifoError
from mifo.method.backbone import DefaultSites, Site, Stage

Maps = Mapping[Site, Tensor]
"""Attention probabilities of the instances' words by site, (B, K, h, w) in [0, 1], mean over heads."""
Masks = Mapping[tuple[int, int], Tensor]
"""Masks of the same instances by size, (B, K, h, w) in [0, 1], bilinear without antialiasing."""


class AttentionLoss(ABC):
    """One loss on word maps. A subclass in a file of its own is found by that file's name.

    Class attributes:
        one_size: whether all maps must have one size, as the default sites of fine-tuning have.
    """

    one_size = False

    def sites(self, stage: Stage, defaults: DefaultSites) -> tuple[Site, ...]:
        """The sites that it reads unless the settings name others."""
        return defaults.semantic if stage == "semantic" and not self.one_size else defaults.finetuning

    @abstractmethod
    def __call__(self, maps: Maps, masks: Masks) -> Tensor:
        """The unweighted loss of each sample and instance, (B, K)."""


def find_loss(name: str) -> AttentionLoss:
    """The loss of the file `name.py` beside this one, or of the dotted path of a class elsewhere."""
    module, _, wanted = name.rpartition(".")
    try:
        found = import_module(module or f"{__package__}.{name}")
    except (ModuleNotFoundError, TypeError, ValueError) as error:  # of a text that is no name of a module
        raise MifoError(f"loss={name} does not exist; take one of {', '.join(known_losses())}") from error
    for key, value in vars(found).items():
        own = inspect.isclass(value) and value.__module__ == found.__name__
        if own and issubclass(value, AttentionLoss) and wanted in (key, name):
            loss: AttentionLoss = value()
            return loss
    raise MifoError(f"loss={name} names no AttentionLoss; take one of {', '.join(known_losses())}")


def known_losses() -> list[str]:
    """The names of the losses in this folder."""
    files, base = sorted(Path(__file__).parent.glob("*.py")), f"({AttentionLoss.__name__}):"
    return [file.stem for file in files if base in file.read_text(encoding="utf-8")]
