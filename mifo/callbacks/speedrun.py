"""A stopwatch that ends learning as soon as pictures of held-out prompts are good enough."""

import time
from dataclasses import dataclass

import torch
from lightning import Trainer

from mifo.callbacks.samples import MakePictures, SamplePictures, make_now
from mifo.data.layouts import LayoutSettings
from mifo.metrics.evaluation import PictureEvaluator
from mifo.training.stages import LearningStage


@dataclass(frozen=True)
class Look:
    """What the pictures were like after some learning; `seconds` leave out the making of these pictures."""

    stage: str
    step: int
    seconds: float
    identification: float
    leakage: float


class Reached(Exception):
    """The target is reached: learning ends here."""


class Stopwatch(SamplePictures):
    """Looks at pictures of `layout` every `every` steps of both stages; its clock runs from its creation.

    The clock stands while pictures are made and measured. `looks` has what was seen so far.

    Args:
        make, layout: as of `SamplePictures`.
        identification, leakage: the least and the greatest that the pictures must have.

    Raises:
        Reached: out of Lightning's loop, when they have both.
    """

    def __init__(
        self,
        make: MakePictures,
        layout: LayoutSettings,
        evaluator: PictureEvaluator,
        every: int,
        identification: float,
        leakage: float,
    ) -> None:
        super().__init__(make, layout, every)
        self.evaluator, self.identification, self.leakage = evaluator, identification, leakage
        self.looks: list[Look] = []
        self._started, self._stood = time.perf_counter(), 0.0

    def look(self, trainer: Trainer, module: LearningStage) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)  # the step must be done before its end is noted
        now = time.perf_counter()
        found = self.evaluator.evaluate(make_now(module, self.make, self.layout), module.instances)
        scores = {score.metric: score.value for score in found.scores}
        seconds, measured = now - self._started - self._stood, (scores["identification"], scores["leakage"])
        look = Look(module.stage, trainer.global_step, seconds, *measured)
        self.looks.append(look)
        self._stood += time.perf_counter() - now
        print(
            f"{look.stage} {look.step}: {look.seconds:.1f} s, identification {look.identification:.3f}, "
            f"leakage {look.leakage:.3f}",
            flush=True,
        )
        if look.identification >= self.identification and look.leakage <= self.leakage:
            raise Reached
