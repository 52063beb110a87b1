"""What loggers are told about finished learning and finished pictures, beside curves and settings."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import wandb
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from mifo.data.instances import InstanceSet
from mifo.data.saved_pictures import Picture, as_image
from mifo.metrics.evaluation import METRICS, Evaluation, best_of
from mifo.report.heat_map import draw_leakage

# where scores are logged: at the end, and by the callback while learning
_SCORES = ("evaluation", "semantic/scores", "finetuning/scores")
_LARGEST_UPLOAD = 100 * 2**20  # bytes; larger weights stay where they are and are named by their checksum


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
    """Send the mean scores, a table of every picture with its scores, and the leakage matrix.

    Args:
        step: of learning, after which the pictures were made; None: nothing was learned here.
    """
    scores = {f"evaluation/{score.metric}": score.value for score in evaluation.scores}
    heat_map = evaluation.leakage_matrix and draw_leakage(evaluation.leakage_matrix, instances.tokens)
    for logger in loggers:
        logger.log_metrics(scores, step)
        if isinstance(logger, WandbLogger):
            _log_table(logger, evaluation, pictures)
            if heat_map:
                logger.log_image("evaluation/leakage_matrix", [heat_map])
        elif isinstance(logger, TensorBoardLogger) and heat_map:
            logger.experiment.add_image(
                "evaluation/leakage_matrix", np.asarray(heat_map), step, dataformats="HWC"
            )


def log_learned(loggers: Sequence[Logger], learned: Path, name: str, seed: int) -> None:
    """Keep the folder `learned/` as an artifact; the seeds of a configuration are versions of one `name`."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            facts = json.loads((learned / "learned.json").read_text())
            artifact = wandb.Artifact(re.sub(r"[^\w.-]+", "_", name), type="learned", metadata=facts)
            for path in sorted(learned.iterdir()):
                if path.stat().st_size > _LARGEST_UPLOAD:
                    artifact.add_reference(path.resolve().as_uri(), name=path.name)
                else:
                    artifact.add_file(str(path))
            logger.experiment.log_artifact(artifact, aliases=[f"seed-{seed}"])


def _log_table(logger: WandbLogger, evaluation: Evaluation, pictures: Sequence[Picture]) -> None:
    metrics = [metric for metric in METRICS if any(metric in row for row in evaluation.pictures)]
    rows = [
        [
            wandb.Image(as_image(picture.image), boxes=_boxes(picture)),
            picture.prompt,
            json.dumps(picture.boxes),
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
