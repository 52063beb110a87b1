"""Pictures made while learning."""

from collections.abc import Callable, Sequence

import torch
from lightning import Trainer

from mifo.backbones.model import DiffusionModel
from mifo.callbacks.logging import Periodic, log_image
from mifo.data.layouts import Layout, LayoutSettings, layouts
from mifo.data.saved_pictures import Picture
from mifo.report.picture_grid import draw_pictures
from mifo.training.stages import LearningStage

MakePictures = Callable[[DiffusionModel, Sequence[Layout]], list[Picture]]


class SamplePictures(Periodic):
    """Makes pictures of `layout` every `every` steps and at the end, always from the same seeds.

    Args:
        make: makes the pictures of layouts with the model as it is now; it holds the settings of synthesis.
        layout: prompts and boxes, for the instances that are learned.
        every: steps between them; 0 makes pictures at the end only.
    """

    def __init__(self, make: MakePictures, layout: LayoutSettings, every: int = 100) -> None:
        super().__init__(every)
        self.make, self.layout = make, layout

    def check(self, tokens: Sequence[str]) -> None:
        """Refuse a layout that the instances `tokens` cannot have.

        Raises:
            MifoError: see `layouts`.
        """
        layouts(self.layout, list(tokens))

    def look(self, trainer: Trainer, module: LearningStage) -> None:
        self.show(trainer, module, make_now(module, self.make, self.layout))

    def show(self, trainer: Trainer, module: LearningStage, pictures: Sequence[Picture]) -> None:
        log_image(trainer, module, "samples", draw_pictures(pictures))


def make_now(module: LearningStage, make: MakePictures, layout: LayoutSettings) -> list[Picture]:
    """Make pictures in the midst of learning; modes and random numbers are put back afterwards."""
    parts = [part for part in module.model.networks.values() if part.training]
    for part in parts:
        part.eval()
    try:
        with torch.random.fork_rng():
            return make(module.model, layouts(layout, list(module.instances.tokens)))
    finally:
        for part in parts:
            part.train()
