"""`mifo evaluate`: pictures against their prompts and the instances they were made from."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mifo.commands.setup import open_loggers, prepare
from mifo.config.jobs import claim_folder
from mifo.config.schema import EvaluateSettings
from mifo.data.instance_names import instances_in
from mifo.data.instances import InstanceSet, read_instances
from mifo.data.saved_pictures import Picture, read_pictures
from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError
from mifo.files import CONFIG, existing_folder, read_yaml
from mifo.method.prompts.instances import INSTANCE
from mifo.metrics.evaluation import PictureEvaluator
from mifo.metrics.scores import SCORES, Evaluation, Score, has_scores
from mifo.metrics.settings import MetricsSettings
from mifo.tracking.results import at_no_cost, log_evaluation

log = logging.getLogger(__name__)


def evaluate(settings: EvaluateSettings) -> Evaluation:
    """Score a folder of pictures, write `scores.json`, print a table.

    Raises:
        MifoError: no metrics, pictures that cannot be read, or instances that are not those of the pictures.
    """
    if settings.metrics is None:
        raise MifoError("metrics=none leaves nothing to evaluate; choose metrics=miniature or standard")
    source = pictures_folder(settings.pictures)
    pictures = read_pictures(source)
    instances = read_instances(settings.instances or recorded_instances(source))
    check_tokens(pictures, instances)
    if warning := other_instances(source, settings.instances):
        log.warning(warning)
    if warning := other_measure(source, settings.metrics):
        log.warning(warning)
    device = prepare(settings)
    folder = claim_folder(settings)
    with open_loggers(settings) as loggers:
        evaluation = scored(settings.metrics, pictures, instances, folder, device)
        with at_no_cost():
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
        evaluator.evaluate(pictures, instances, lambda each: track(each, "evaluation")).save(path)
    evaluation = Evaluation.read(path)
    if len(evaluation.pictures) != len(pictures):
        raise MifoError(
            f"{path} scores {len(evaluation.pictures)} pictures, but there are {len(pictures)}; move it away "
            "to have them scored anew"
        )
    return evaluation


def pictures_folder(given: str) -> Path:
    """The folder of pictures, given itself or the run that holds it."""
    folder = existing_folder("pictures", given, "what mifo synthesize or mifo run made")
    if (folder / "pictures").is_dir():
        return folder / "pictures"
    if (folder / "learned").is_dir() or (folder / "learned.json").is_file():
        raise MifoError(
            f"pictures={folder} holds what mifo learn made, and no pictures; give the folder that "
            f"mifo synthesize learned={folder} makes"
        )
    return folder


def recorded_instances(pictures: Path) -> InstancesSettings:
    """The instances that the tokens in the pictures were learned from, as recorded beside the pictures."""
    recorded = pictures / "instances.yaml"
    if not recorded.exists():
        raise MifoError(f"{recorded} is missing, so the instances are not known; name them by instances=…")
    try:
        return instances_in(recorded)
    except MifoError as error:
        raise MifoError(f"{error}; name the instances by instances=…") from error


def other_instances(pictures: Path, given: InstancesSettings | None) -> str | None:
    """A warning if the `given` instances are not those that the pictures' tokens were learned from."""
    if given is None or not (pictures / "instances.yaml").is_file():
        return None
    recorded = recorded_instances(pictures)
    if (recorded.folder, recorded.scene) == (given.folder, given.scene):
        return None
    return (
        f"These pictures were learned from {recorded.folder or recorded.name}, but are scored against "
        f"{given.folder or given.name}; leave instances=… out to score them against their own."
    )


def check_tokens(pictures: Sequence[Picture], instances: InstanceSet) -> None:
    """Refuse pictures of instances that are not among `instances`; boxes of other words are no instances."""
    for picture in pictures:
        for token in INSTANCE.findall(" ".join([picture.prompt, *picture.boxes])):
            if token not in instances.tokens:
                raise MifoError(
                    f"the pictures show {token}, but {instances.name} has {', '.join(instances.tokens)}; "
                    "name by instances=… what they were learned from, or leave it out where it is recorded"
                )


def other_measure(pictures: Path, metrics: MetricsSettings) -> str | None:
    """A warning if `metrics` are not those of the pictures' own run, or not meant for its model."""
    recorded = pictures.parent / CONFIG
    if not recorded.is_file():
        return None
    run = read_yaml(recorded)
    if not isinstance(run, dict) or run.get("task") not in ("run", "synthesize"):
        return None
    theirs, model = run.get("metrics"), run.get("model")
    if isinstance(theirs, dict):
        mine = OmegaConf.to_container(OmegaConf.structured(metrics), enum_to_str=True)
        other = [f"metrics.{key}" for key in mine if key != "batch_size" and mine[key] != theirs.get(key)]
        if other:
            return (
                f"The run of these pictures was measured with another {', '.join(other)} "
                f"(protocol {theirs.get('protocol')}, here {metrics.protocol}): the scores do not compare."
            )
    elif (
        isinstance(model, dict)
        and metrics.protocol == "miniature"
        and not str(model.get("source")).startswith("embedded")
    ):
        return (
            f"These pictures were made with {model.get('name')}, but metrics=miniature knows the "
            "miniature's drawings alone; metrics=standard measures others."
        )
    return None


def objective_values(folder: Path, wanted: Sequence[str]) -> float | list[float]:
    """The `wanted` scores of a run as a search reads them: one alone as a number."""
    found = {score.metric: score.value for score in Evaluation.read(folder / SCORES).scores}
    if missing := [name for name in wanted if name not in found]:
        raise MifoError(f"objectives: {missing[0]} was not measured; take of {', '.join(found)}")
    values = [found[name] for name in wanted]
    return values[0] if len(values) == 1 else values


def print_scores(scores: tuple[Score, ...]) -> None:
    """Print one line per metric."""
    table = Table("metric", "mean", "over")
    table.add_column("measured by", overflow="fold")
    for score in scores:
        table.add_row(
            f"{score.metric} {score.arrow}",
            f"{score.value:.3f}",
            str(score.count),
            f"{score.evaluator.name} ({score.protocol})",
        )
    Console().print(table)
