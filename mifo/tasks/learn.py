"""`mifo learn`: the instances of one image, each as a new token."""

from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger

from mifo.config.jobs import CONFIG, claim_folder
from mifo.config.schema import LearnSettings
from mifo.data.instances import InstanceSet, read_instances
from mifo.learning.learn import learn as fit
from mifo.models.learned import load_learned
from mifo.models.loading import DiffusionModel, load_model
from mifo.tasks.setup import open_loggers, prepare
from mifo.tasks.tracking import log_learned


def learn(settings: LearnSettings) -> Path:
    """Learn both stages; returns the folder `learned/` of the run."""
    instances = read_instances(settings.instances)
    device = prepare(settings)
    folder = claim_folder(settings)
    with open_loggers(settings) as loggers:
        learned_model(settings, instances, folder, device, loggers)
    print(f"learned: {folder / 'learned'}")
    return folder / "learned"


def learned_model(
    settings: LearnSettings,
    instances: InstanceSet,
    folder: Path,
    device: torch.device,
    loggers: Sequence[Logger],
) -> DiffusionModel:
    """The base model with what `folder/learned` holds, which is learned first if it is not there yet."""
    model = load_model(settings.model, device)
    if (folder / "learned").is_dir():
        load_learned(folder / "learned", model)
        return model
    fit(
        model,
        instances,
        settings.learning,
        settings.penalty,
        folder,
        seed=settings.seed,
        trainer=settings.trainer,
        callbacks=[instantiate(callback) for callback in settings.callbacks.values()],
        loggers=loggers,
        config=(folder / CONFIG).read_text(),
        performance=settings.performance,
    )
    log_learned(loggers, folder / "learned", settings.group or settings.method, settings.seed)
    return model.to(device)
