"""Scores while learning."""

from collections.abc import Sequence

from lightning import Trainer

from mifo.callbacks.logging import log_image, log_values
from mifo.callbacks.samples import MakePictures, SamplePictures
from mifo.data.layouts import LayoutSettings
from mifo.data.saved_pictures import Picture
from mifo.metrics.evaluation import PictureEvaluator
from mifo.metrics.settings import MetricsSettings
from mifo.report.heat_map import draw_leakage
from mifo.training.stages import LearningStage


class EvaluatePictures(SamplePictures):
    """Makes pictures as `SamplePictures` does, and logs them, their mean scores and their leakage matrix.

    The evaluators are loaded before the first step, so that missing weights are found at once.
    """

    def __init__(
        self, make: MakePictures, layout: LayoutSettings, metrics: MetricsSettings, every: int = 200
    ) -> None:
        super().__init__(make, layout, every)
        self.metrics = metrics
        self._evaluator: PictureEvaluator | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LearningStage) -> None:
        if self._evaluator is None:
            self._evaluator = PictureEvaluator.from_settings(self.metrics, pl_module.device)

    def show(self, trainer: Trainer, module: LearningStage, pictures: Sequence[Picture]) -> None:
        super().show(trainer, module, pictures)
        assert self._evaluator is not None  # loaded at the start of fitting
        result = self._evaluator.evaluate(pictures, module.instances)
        log_values(trainer, module, "scores", {score.metric: score.value for score in result.scores})
        if result.leakage_matrix:
            log_image(
                trainer, module, "leakage", draw_leakage(result.leakage_matrix, module.instances.tokens)
            )
