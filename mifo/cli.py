"""The console command `mifo`: each task is a Hydra application, and each refusal one sentence."""

import logging
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mifo.config.compose import REFUSALS, explain, register_schemas, settings_of
from mifo.config.gpus import claim_gpu
from mifo.config.jobs import begin_job, end_failed_job, recorded_overrides, report_sweep, write_status
from mifo.config.location import conf_folder
from mifo.errors import MifoError

log = logging.getLogger(__name__)
TRACEBACK_WANTED = os.environ.get("HYDRA_FULL_ERROR") == "1"

TASKS = {
    "run": "learn, synthesize and evaluate, and end with a contact sheet",
    "learn": "learn the instances of one image, each as a new token",
    "synthesize": "make pictures with the learned instances in their boxes",
    "evaluate": "score pictures against their prompts and the learned instances",
    "layout": "draw the boxes of a layout, without loading a model",
    "table": "make the runs of a table in experiments/ that are missing, and the table",
    "dashboard": "write the workspace that compares ablations on Weights & Biases",
    "pretrain": "make the miniature's weights again, on one GPU",
    "benchmark": "time and memory of learning and synthesis on this machine, row by row",
    "calibrate": "score drawn pictures whose leakage is known",
    "quality": "measure the miniature's models on scenes they never saw",
}

HELP = f"""mifo: learn several, even look-alike, instances from one image and put them, unmixed, into boxes

usage: mifo TASK [key=value | group=option ...] [-m] [--help] [--cfg job]

tasks:
{"".join(f"  {name:<12}{about}{chr(10)}" for name, about in TASKS.items())}
examples:
  mifo run                                                        the demo image, on the embedded miniature
  mifo run model=sd21 instances=local instances.folder=my_photo   your own img.jpg and mask0.png, mask1.png, …
  mifo learn -m penalty=mifo,none seed=1,2                        a sweep: four runs in folders of their own
  mifo learn resume=outputs/learn/…                               go on where a run was interrupted

mifo TASK --help lists the groups, their options and every key of a task."""


def main() -> None:
    """Run the task named first on the command line. Exit codes: 0 done, 1 failed, 2 refused."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    task, *overrides = arguments
    # otherwise Hydra prints a traceback of its own and exits before the error reaches us
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        if task not in TASKS:
            raise MifoError(f"'{task}' is no task; take one of {', '.join(TASKS)}")
        if task == "table":  # composes many runs, so that it is no Hydra application itself
            sys.exit(min(1, import_module("mifo.commands.table").table(overrides)))
        register_schemas()
        sys.argv = [f"mifo {task}", *recorded_overrides(overrides), *overrides]
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=task)(run_job)()
    except (KeyboardInterrupt, Interrupted) as error:
        print("mifo: interrupted; what is finished stays, and the run can be continued", file=sys.stderr)
        if isinstance(error, Interrupted) and error.folder:
            print(f"mifo: go on with: mifo {task} resume={error.folder}", file=sys.stderr)
        sys.exit(error.code if isinstance(error, Interrupted) else 130)
    except Exception as error:
        if report_sweep():
            sys.exit(1)
        if TRACEBACK_WANTED or not isinstance(error, (MifoError, OSError, *REFUSALS)):
            raise
        _refuse(explain(error, task))
    report_sweep()


class Interrupted(BaseException):
    """A job was asked to stop. `code` is the exit code of its signal, `folder` where it can be continued."""

    def __init__(self, code: int, folder: Path | None = None) -> None:
        super().__init__(code, folder)
        self.code, self.folder = code, folder


def run_job(config: DictConfig) -> Any:
    """Run the task of one composed configuration, here or in a launcher's process, and record how it ends."""
    job = HydraConfig.get()
    folder, overrides = Path(job.runtime.output_dir), list(job.overrides.task)
    before = begin_job(folder, overrides)
    try:
        # before diffusers or lightning are imported, which makes CUDA list the GPUs for good
        if config.exclusive_gpu or job.runtime.choices["hydra/launcher"] == "gpus":
            claim_gpu()
        settings = settings_of(config)
        import_module("mifo.config.checks").check(settings)
        result = getattr(import_module(f"mifo.commands.{config.task}"), config.task)(settings)
        if wanted := getattr(settings, "objectives", None):
            result = import_module("mifo.commands.evaluate").objective_values(folder, wanted)
    except BaseException as error:
        if code := _signalled(error):
            write_status(folder, "interrupted", overrides, "interrupted; it can be continued")
            raise Interrupted(code, folder if job.mode == RunMode.RUN else None) from error
        reason = str(error) if isinstance(error, MifoError) else f"{type(error).__name__}: {error}"
        # a sweep's summary is made of these files, so that its jobs always say how they ended
        end_failed_job(folder, before if job.mode == RunMode.RUN else None, overrides, reason)
        if job.mode == RunMode.MULTIRUN:
            log.error("job %s failed: %s", job.job.num, reason, exc_info=not isinstance(error, MifoError))
        elif isinstance(error, MifoError) and not TRACEBACK_WANTED:
            _refuse(reason)
        raise
    write_status(folder, "ok", overrides)
    return result


def _signalled(error: BaseException) -> int | None:
    """The exit code of the signal that ended a job, None where it was none; Lightning exits for them."""
    if type(error).__name__ == "SIGTERMException":
        return 128 + signal.SIGTERM
    causes = (error, error.__context__) if isinstance(error, SystemExit) else (error,)
    return 128 + signal.SIGINT if any(isinstance(each, KeyboardInterrupt) for each in causes) else None


def _refuse(reason: str) -> NoReturn:
    print("mifo: error:", " ".join(reason.split()), file=sys.stderr)
    sys.exit(2)
