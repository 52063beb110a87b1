"""What loggers are told about finished learning and finished pictures, beside curves and settings."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import wandb
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from mifo.data.instances import InstanceSet
from mifo.data.saved_pictures import Picture, as_image
from mifo.files import reason
from mifo.metrics.evaluation import METRICS, best_of
from mifo.metrics.scores import Evaluation
from mifo.report.heat_map import draw_leakage
from mifo.report.picture_grid import draw_pictures
from mifo.tracking.trackio_logger import TrackioLogger

# where scores are logged: at the end, and by the callback while learning
_SCORES = ("evaluation", "semantic/scores", "finetuning/scores")
_LARGEST_UPLOAD = 100 * 2**20  # bytes; larger weights stay where they are and are named by their checksum

log = logging.getLogger(__name__)


@contextmanager
def at_no_cost() -> Iterator[None]:
    """A server that takes not everything ends no run, whose folder has all of it; a warning says so."""
    try:
        yield
    except wandb.errors.Error as error:
        log.warning("Weights & Biases did not take everything of this run: %s", reason(error))


def define_metrics(logger: WandbLogger) -> None:
    """Tell Weights & Biases in which direction each score is better, for the summary of the run."""
    for metric in METRICS:
        for group in _SCORES:
            logger.experiment.define_metric(
                f"{group}/{metric}", step_metric="trainer/global_step", summary=f"{best_of(metric)},last"
            )


def log_evaluation(
    loggers: Sequence[Logger],
    evaluation: Evaluation,
    pictures: Sequence[Picture],
    instances: InstanceSet,
    step: int | None = None,
) -> None:
    """Send the mean scores, all pictures, a table of them with their scores, and the leakage matrix.

    Args:
        step: of learning, after which the pictures were made; None: nothing was learned here.
    """
    scores = {f"evaluation/{score.metric}": score.value for score in evaluation.scores}
    shown = {"evaluation/samples": draw_pictures(pictures)}
    if evaluation.leakage_matrix:
        shown["evaluation/leakage_matrix"] = draw_leakage(evaluation.leakage_matrix, instances.tokens)
    for logger in loggers:
        logger.log_metrics(scores, step)
        if isinstance(logger, WandbLogger | TrackioLogger):
            _log_table(logger, evaluation, pictures)
            for key, image in shown.items():
                logger.log_image(key, [image])
        elif isinstance(logger, TensorBoardLogger):
            for key, image in shown.items():
                logger.experiment.add_image(key, np.asarray(image), step, dataformats="HWC")


def log_learned(loggers: Sequence[Logger], learned: Path, name: str, group: str | None) -> None:
    """Keep the folder `learned/` as the artifact `name`, of which the group is an alias."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            facts = json.loads((learned / "learned.json").read_text())
            artifact = wandb.Artifact(_plain(name), type="learned", metadata=facts)
            for path in sorted(learned.iterdir()):
                if path.stat().st_size > _LARGEST_UPLOAD:
                    artifact.add_reference(path.resolve().as_uri(), name=path.name)
                else:
                    artifact.add_file(str(path))
            logger.experiment.log_artifact(artifact, aliases=[_plain(group)] if group else None)


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[:128]


def log_table(logger: WandbLogger, name: str, folder: Path) -> None:
    """Send a finished table: estimates, plot, pages of pictures, and its files as an artifact."""
    pages = [wandb.Image(str(path), caption=path.stem) for path in sorted(folder.glob("pictures-*.jpg"))]
    shown = {
        "table/estimates": wandb.Table(dataframe=pd.read_csv(folder / "table.csv")),
        "table/plot": wandb.Image(str(folder / "table.png")),
    }
    logger.experiment.log(shown | ({"table/pages": pages} if pages else {}))
    artifact = wandb.Artifact(_plain(f"table-{name}"), type="table")
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name != "wandb_id.txt":
            artifact.add_file(str(path))
    logger.experiment.log_artifact(artifact)


def _log_table(
    logger: WandbLogger | TrackioLogger, evaluation: Evaluation, pictures: Sequence[Picture]
) -> None:
    metrics = [metric for metric in METRICS if any(metric in row for row in evaluation.pictures)]
    rows = [
        [
            wandb.Image(as_image(picture.image), boxes=_boxes(picture))
            if isinstance(logger, WandbLogger)
            else as_image(picture.image),
            picture.prompt,
            json.dumps({name: [round(edge, 4) for edge in box] for name, box in picture.boxes.items()}),
            picture.seed,
            *(row.get(metric) for metric in metrics),
        ]
        for picture, row in zip(pictures, evaluation.pictures, strict=True)
    ]
    logger.log_table("evaluation/pictures", ["picture", "prompt", "boxes", "seed", *metrics], rows)


def _boxes(picture: Picture) -> dict | None:
    """The boxes as an overlay that the dashboard can switch on."""
    if not picture.boxes:
        return None
    data = [
        {
            "position": {"minX": x0, "minY": y0, "maxX": x1, "maxY": y1},
            "class_id": index,
            "box_caption": name,
        }
        for index, (name, (x0, y0, x1, y1)) in enumerate(picture.boxes.items())
    ]
    return {"layout": {"box_data": data, "class_labels": dict(enumerate(picture.boxes))}}
