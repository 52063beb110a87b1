"""`mifo learn`: the instances of one image, each as a new token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Callback
from lightning.pytorch.loggers import Logger

from mifo.backbones.learned import load_learned
from mifo.backbones.loading import load_model
from mifo.backbones.model import DiffusionModel
from mifo.callbacks.samples import SamplePictures
from mifo.commands.readiness import Setup, check_ready
from mifo.commands.setup import open_loggers, prepare
from mifo.config.jobs import claim_folder
from mifo.config.schema import LearnSettings
from mifo.data.instances import InstanceSet
from mifo.errors import MifoError, root_cause
from mifo.files import CONFIG
from mifo.tracking.results import at_no_cost, log_learned
from mifo.training.fit import learn as fit
from mifo.training.fit import remove_checkpoints


def learn(settings: LearnSettings) -> Path:
    """Learn both stages; returns the folder `learned/` of the run."""
    setup = Setup(settings)
    check_ready(setup)
    device = prepare(settings)
    folder = claim_folder(settings)
    with open_loggers(settings) as loggers:
        learned_model(settings, setup.instances, folder, device, loggers)
    print(f"learned: {folder / 'learned'}")
    return folder / "learned"


def learned_model(
    settings: LearnSettings,
    instances: InstanceSet,
    folder: Path,
    device: torch.device,
    loggers: Sequence[Logger],
) -> DiffusionModel:
    """The base model with the result in `folder/learned`, which is learned first if it is missing."""
    callbacks = [_callback(name, node, instances) for name, node in settings.callbacks.items()]
    model = load_model(settings.model, device)
    if (folder / "learned").is_dir():
        load_learned(folder / "learned", model)
        remove_checkpoints(folder)  # a kill may have left them beside the result
        return model
    fit(
        model,
        instances,
        settings.learning,
        settings.penalty,
        folder,
        seed=settings.seed,
        trainer=settings.trainer,
        callbacks=callbacks,
        loggers=loggers,
        config=(folder / CONFIG).read_text(),
        performance=settings.performance,
    )
    with at_no_cost():
        log_learned(loggers, folder / "learned", settings.told_result(instances.name), settings.group)
    return model.to(device)


def _callback(name: str, node: dict[str, Any], instances: InstanceSet) -> Callback:
    try:
        callback = instantiate(node)
        if isinstance(callback, SamplePictures):
            callback.check(instances.tokens)
    except (InstantiationException, MifoError) as error:
        raise MifoError(f"callbacks.{name} does not take its arguments: {root_cause(error)}") from error
    return callback
