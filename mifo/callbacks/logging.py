"""What callbacks log now and then: pictures and figures, with every logger that takes them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from mifo.errors import MifoError
from mifo.tracking.trackio_logger import TrackioLogger
from mifo.training.stages import LearningStage


def log_image(trainer: Trainer, module: LearningStage, name: str, image: Image.Image) -> Path:
    """Write `learning/{name}/{stage}-{step}.png` in the run's folder and send it to the loggers."""
    step = trainer.global_step
    path = Path(trainer.default_root_dir) / "learning" / name / f"{module.stage}-{step:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    key = f"{module.stage}/{name}"
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger | TrackioLogger):
            logger.log_image(key, [image], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, np.asarray(image), step, dataformats="HWC")
    return path


def log_values(
    trainer: Trainer, module: LearningStage, group: str, values: Mapping[str, float | Tensor]
) -> None:
    """Send `{stage}/{group}/{name}` to every logger at once, also at steps whose losses are not logged."""
    named = {f"{module.stage}/{group}/{name}": float(value) for name, value in values.items()}
    for logger in trainer.loggers:
        logger.log_metrics(named, trainer.global_step)


class Periodic(Callback, ABC):
    """A callback that looks at learning every `every` steps, 0 for never, and at the end of a stage.

    Raises:
        MifoError: `every` is no whole number, or negative.
    """

    def __init__(self, every: int) -> None:
        if not isinstance(every, int) or every < 0:
            raise MifoError(f"`every` must be a non-negative integer, unlike {every}.")
        self.every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LearningStage, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        step = trainer.global_step
        if step == trainer.max_steps or (self.every > 0 and step % self.every == 0):
            self.look(trainer, pl_module)

    @abstractmethod
    def look(self, trainer: Trainer, module: LearningStage) -> None:
        """What happens then."""
