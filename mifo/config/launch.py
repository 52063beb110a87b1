"""Commands and jobs called by their names, so that what launches them imports none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from hydra.utils import get_method
from omegaconf import DictConfig

from mifo.config.compose import REFUSALS, explain, written
from mifo.config.gpus import claim_if_asked
from mifo.config.location import conf_folder
from mifo.config.schema import TaskSettings
from mifo.errors import MifoError

Launch = Callable[[Sequence[Sequence[Any]]], None]


def perform(settings: TaskSettings) -> Any:
    """Check settings and run their command; returns what the command made.

    Raises:
        MifoError: the settings cannot work, or the command refuses them.
    """
    if settings.task != "doctor":  # which tells what is refused as one of its lines
        import_module("mifo.config.checks").check(settings)
    return getattr(import_module(f"mifo.commands.{settings.task}"), settings.task)(settings)


@dataclass(frozen=True)
class _Call:
    """The task of a launcher: one call of a function for each job.

    It holds plain values and imports the function late: a GPU must be claimed before Lightning is imported.
    """

    function: str
    jobs: Sequence[Sequence[Any]]
    exclusive_gpu: bool

    def __call__(self, config: DictConfig) -> None:
        claim_if_asked(self.exclusive_gpu)
        get_method(self.function)(*self.jobs[HydraConfig.get().job.num])


def launcher(function: str, overrides: Sequence[str], folder: Path, exclusive_gpu: bool = False) -> Launch:
    """How to call `function(*job)` for many jobs through the launcher that is chosen by `overrides`.

    Args:
        function: its dotted name. Arguments of jobs are of plain types, since they travel to processes.
        overrides: of Hydra's own keys, such as hydra/launcher=joblib and hydra.launcher.n_jobs=4; without
            them the jobs run in this process, one after the other.
        folder: where a launcher that keeps files, such as submitit, puts them.
        exclusive_gpu: a process takes a GPU that no other job of this host has taken.

    Returns:
        A function of the jobs. It returns when all have ended, and raises what the first failed one raised.

    Raises:
        MifoError: the launcher is not installed, or has no such key.
    """
    own = [
        f"hydra.sweep.dir={written(folder.absolute())}",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
    ]
    quiet = ["hydra/hydra_logging=none", "hydra/job_logging=none", "hydra.job.name=table"]
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        composer = GlobalHydra.instance().hydra
        given = [*own, *quiet, *overrides]
        try:
            config = composer.compose_config(None, given, RunMode.MULTIRUN, with_log_configuration=False)
        except REFUSALS as error:
            raise MifoError(explain(error, "run")) from error
    context = HydraContext(config_loader=composer.config_loader, callbacks=Callbacks())

    def launch(jobs: Sequence[Sequence[Any]]) -> None:
        task = _Call(function, jobs, exclusive_gpu)
        chosen = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task, config=config
        )
        for ended in chosen.launch([[] for _ in jobs], initial_job_idx=0):
            _ = ended.return_value  # raises what the job raised

    return launch
