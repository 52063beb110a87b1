"""The progress bar of a stage."""

from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mifo.training.stages import LearningStage


class StageProgress(ProgressBar):
    """Stage, steps done of all, time left and the last logged loss. Learning has steps and no epochs."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Progress | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LearningStage) -> None:
        super().on_train_start(trainer, pl_module)
        self._bar = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        self._task = self._bar.add_task(
            pl_module.stage, total=trainer.max_steps, completed=trainer.global_step, loss=""
        )
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LearningStage, outputs, batch, batch_index: int
    ) -> None:
        assert self._bar is not None  # made at the start of fitting
        self._bar.update(self._task, completed=trainer.global_step)
        # `logged_metrics` is on the host already at the steps that were logged
        if (loss := trainer.logged_metrics.get(f"{pl_module.stage}/loss/total")) is not None:
            self._bar.update(self._task, loss=f"loss {float(loss):.4f}")

    def on_train_end(self, trainer: Trainer, pl_module: LearningStage) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LearningStage, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
