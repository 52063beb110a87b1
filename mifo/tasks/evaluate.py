"""`mifo evaluate`: pictures against their prompts and the instances they were made from."""

from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mifo.config.jobs import claim_folder
from mifo.config.schema import EvaluateSettings
from mifo.data.instances import InstanceSet, read_instances
from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError
from mifo.metrics.evaluation import Evaluation, PictureEvaluator, has_scores
from mifo.metrics.pictures import Picture, read_pictures
from mifo.metrics.scores import Score
from mifo.metrics.settings import MetricsSettings
from mifo.tasks.setup import open_loggers, prepare
from mifo.tasks.tracking import log_evaluation

SCORES = "scores.json"


def evaluate(settings: EvaluateSettings) -> Evaluation:
    """Score a folder of pictures, write `scores.json`, print a table."""
    if settings.metrics is None:
        raise MifoError(
            "metrics=none leaves nothing to evaluate; choose metrics=miniature or metrics=standard"
        )
    source = pictures_folder(settings.pictures)
    pictures = read_pictures(source)
    instances = read_instances(settings.instances or recorded_instances(source))
    device = prepare(settings)
    folder = claim_folder(settings)
    with open_loggers(settings) as loggers:
        evaluation = scored(settings.metrics, pictures, instances, folder, device)
        log_evaluation(loggers, evaluation, pictures, instances)
    print_scores(evaluation.scores)
    print(f"scores: {folder / SCORES}")
    return evaluation


def scored(
    settings: MetricsSettings,
    pictures: Sequence[Picture],
    instances: InstanceSet,
    folder: Path,
    device: torch.device,
) -> Evaluation:
    """The scores in `folder/scores.json`, measured first where they are not there yet."""
    path = folder / SCORES
    if not has_scores(path):
        evaluator = PictureEvaluator.from_settings(settings, device)
        evaluator.evaluate(
            pictures,
            instances.image.float() / 255,
            instances.masks,
            instances.tokens,
            class_names(instances),
            progress=lambda each: track(each, "evaluation"),
        ).save(path)
    return Evaluation.read(path)


def pictures_folder(given: str) -> Path:
    """The folder of pictures, given itself or the run that holds it."""
    folder = Path(given).expanduser()
    return folder / "pictures" if (folder / "pictures").is_dir() else folder


def recorded_instances(pictures: Path) -> InstancesSettings:
    """The instances that the tokens in the pictures were learned from.

    Raises:
        MifoError: nothing is recorded beside the pictures.
    """
    recorded = pictures / "instances.yaml"
    if not recorded.is_file():
        raise MifoError(f"{recorded} is missing, so the instances are not known; name them by instances=…")
    return OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(InstancesSettings), OmegaConf.load(recorded))
    )


def objective_values(folder: Path, wanted: Sequence[str]) -> float | list[float]:
    """The `wanted` scores of a run as a search reads them: one alone as a number.

    Raises:
        MifoError: one of them was not measured.
    """
    found = {score.metric: score.value for score in Evaluation.read(folder / SCORES).scores}
    if missing := [name for name in wanted if name not in found]:
        raise MifoError(f"objectives: {missing[0]} was not measured; take of {', '.join(found)}")
    values = [found[name] for name in wanted]
    return values[0] if len(values) == 1 else values


def class_names(instances: InstanceSet) -> tuple[str | None, ...]:
    """One class name, or None, for each instance."""
    return instances.class_names or (None,) * len(instances.tokens)


def print_scores(scores: tuple[Score, ...]) -> None:
    """Print one line per metric."""
    table = Table("metric", "better", "mean", "over", "measured by")
    for score in scores:
        table.add_row(
            score.metric,
            score.arrow,
            f"{score.value:.3f}",
            str(score.count),
            f"{score.evaluator} ({score.protocol})",
        )
    Console().print(table)
