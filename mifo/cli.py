"""The console command `mifo`: each task is a Hydra application, and each refusal one sentence.

What takes long to import is imported inside the functions, so that a signal finds this module ready.
"""

import io
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mifo.errors import Interrupted, MifoError, refuse, signalled, told

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)
TRACEBACK_WANTED = os.environ.get("HYDRA_FULL_ERROR") == "1"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

TASKS = {
    "run": "learn, synthesize and evaluate, and end with a contact sheet",
    "learn": "learn the instances of one image, each as a new token",
    "synthesize": "make pictures with the learned instances in their boxes",
    "evaluate": "score pictures against their prompts and the learned instances",
    "export": "words and weights as files of diffusers or webui, with a model card",
    "doctor": "check the whole setup of a run in seconds, and say what to mend",
    "masks": "make masks from boxes or clicks, and show them over the picture",
    "layout": "draw the boxes of a layout, without loading a model",
    "studio": "masks, learning, boxes and pictures in the browser",
    "table": "make the runs of a table in experiments/ that are missing, and the table",
    "tune": "the same budget of trials for every method (extra optuna)",
    "results": "list, filter and compare the runs on disk by any setting or score",
    "dashboard": "write the workspace that compares ablations on Weights & Biases",
    "pretrain": "make the miniature's weights again, on one GPU",
    "benchmark": "time and memory of learning and synthesis on this machine, row by row",
    "speedrun": "seconds until the demo's image is learned, on a leaderboard",
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
    """Run the task named first on the command line.

    Exit codes: 0 done, 1 failed, 2 refused, 128 + n stopped by signal n.
    """
    # a run that goes on changes the working folder, which must not become a place of modules
    sys.path[:] = [place or os.getcwd() for place in sys.path]
    _keep_output()
    arguments = sys.argv[1:]
    # a request to end, and a terminal that closes
    with _handling(_stop, (signal.SIGTERM, signal.SIGHUP)):
        try:
            _run(arguments)
        except (KeyboardInterrupt, Interrupted) as error:
            with _undisturbed() as held:
                print("mifo: interrupted; what is finished stays", file=sys.stderr)
                print(f"mifo: go on with: {_way_on(error, arguments)}", file=sys.stderr)
                if jobs := sys.modules.get("mifo.config.jobs"):
                    jobs.report_sweep()
                held.clear()
            sys.exit(error.code if isinstance(error, Interrupted) else 128 + signal.SIGINT)


def _run(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    task, *others = arguments
    if task not in TASKS:
        refuse(f"'{task}' is no task; take one of {', '.join(TASKS)}")
    if task == "results":  # it needs no Hydra, and starts at once
        try:
            return import_module("mifo.commands.results").results(others)
        except MifoError as error:
            refuse(str(error))
    # otherwise Hydra prints a traceback of its own and exits before the error reaches us
    os.environ["HYDRA_FULL_ERROR"] = "1"
    from mifo.config.compose import REFUSALS, explain
    from mifo.config.jobs import report_sweep

    try:
        if task in ("table", "tune"):  # compose many runs, so that they are no Hydra applications
            if not others or {"-h", "--help"} & {*others}:
                print(import_module(f"mifo.tables.{'settings' if task == 'table' else 'tuning'}").HELP)
                return
            if lost := getattr(import_module(f"mifo.commands.{task}"), task)(others):
                what = "runs" if task == "table" else "methods"
                print(f"mifo: error: {lost} {what} have no result; why stands above", file=sys.stderr)
                sys.exit(1)
            return
        _run_with_hydra(task, others)
    except Exception as error:
        if code := signalled(error):  # a library took the signal for a fault of its own
            raise Interrupted(code) from error
        if report_sweep():
            sys.exit(1)
        if TRACEBACK_WANTED or not isinstance(error, (MifoError, OSError, *REFUSALS)):
            raise
        refuse(explain(error, task))
    report_sweep()


def _run_with_hydra(task: str, arguments: Sequence[str]) -> None:
    import hydra

    from mifo.config.compose import check_options, register_schemas
    from mifo.config.location import conf_folder
    from mifo.config.resume import RESUMED, folder_to_resume, resume
    from mifo.config.sweeps import register_place_of_job

    register_schemas(task)
    register_place_of_job()
    folder, arguments = folder_to_resume(arguments)
    overrides, flags = _overrides_and_flags(task, arguments)
    if folder is not None:
        if {"-m", "--multirun"} & {*flags}:
            raise MifoError(
                "resume= goes on with one run; leave out -m, or repeat a sweep with its hydra.sweep.dir"
            )
        resume(task, folder, overrides)
    check_options(overrides)
    sys.argv = [f"mifo {task}", *overrides, *flags]
    application = hydra.main(str(conf_folder()), RESUMED if folder else task, version_base="1.3")
    application(run_job)()


def _overrides_and_flags(task: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments in any order as Hydra reads them: every `key=value`, and the flags with their values.

    Raises:
        MifoError: a flag that Hydra does not know, or flags that exclude each other.
    """
    from hydra._internal.utils import get_args_parser

    def error(reason: str) -> None:
        raise MifoError(
            f"{reason}; keys are given as key=value, and mifo {task} --help lists them and the flags"
        )

    parser = get_args_parser()
    parser.error = error
    known = parser.parse_intermixed_args(arguments)
    chosen = [flag for flag in ("run", "cfg", "multirun", "info", "shell_completion") if getattr(known, flag)]
    if len(chosen) > 1 or (known.resolve and not (known.cfg or known.help)):
        error("of --run, --cfg, --multirun and --info only one can be given, and --resolve with --cfg alone")
    flags = list(arguments)
    for text in known.overrides:
        flags.remove(text)
    return known.overrides, flags


def run_job(config: "DictConfig") -> Any:
    """Run the task of one composed configuration, here or in a launcher's process, and record how it ends."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from mifo.config.compose import add_origin, explain, settings_of
    from mifo.config.gpus import claim_if_asked
    from mifo.config.jobs import Job, unlock_folders
    from mifo.config.resume import recorded_command
    from mifo.config.sweeps import is_kept, remember

    here = HydraConfig.get()
    folder, alone = Path(here.runtime.output_dir), here.mode == RunMode.RUN
    overrides = recorded_command(folder).overrides if config.resume else list(here.overrides.task)
    job = Job(folder, overrides, alone)
    try:
        if not alone and is_kept(folder, config):
            return _objectives(config, folder)
        job.tell("running")
        # before diffusers or lightning are imported, which makes CUDA list the GPUs for good
        claim_if_asked(config.exclusive_gpu)
        if alone:
            add_origin(config, here)
        else:
            sweep = str(Path(here.sweep.dir).absolute())
            add_origin(config, here, sweep=sweep, swept=import_module("mifo.config.jobs").swept)
        settings = settings_of(config)
        result = import_module("mifo.config.launch").perform(settings)
        if config.get("objectives"):
            result = _objectives(config, folder)
        job.tell("ok")
        if alone:
            with suppress(OSError):
                remember(config, folder)
        return result
    except BaseException as error:
        reason = told(error)
        code = signalled(error)
        with _undisturbed() as held:
            with suppress(OSError):  # a full disk may be why the job ends, and must not hide it
                if code:
                    job.stop(code)
                else:  # a sweep's summary is made of these files, so that its jobs always say how they ended
                    job.fail(reason)
            if code:
                held.clear()
        if code:
            raise Interrupted(code, _command_for(config.task, folder) if alone else None) from error
        if not alone:
            log.error("job %s failed: %s", here.job.num, reason, exc_info=not isinstance(error, MifoError))
        elif isinstance(error, MifoError | OSError) and not TRACEBACK_WANTED:
            refuse(explain(error, config.task))
        raise
    finally:
        unlock_folders()


def _objectives(config: "DictConfig", folder: Path) -> Any:
    """The scores of a run that a search asked for, if there is one."""
    wanted = config.get("objectives")
    return import_module("mifo.commands.evaluate").objective_values(folder, wanted) if wanted else None


def _command_for(task: str, folder: Path) -> str | None:
    """The command that continues the run in `folder`; None where nothing has begun there."""
    from mifo.config.resume import trusted_again

    try:
        return shlex.join(["mifo", task, f"resume={folder}", *trusted_again(folder, task)])
    except MifoError:
        return None


def _way_on(error: BaseException, arguments: Sequence[str]) -> str:
    """The command that goes on after an interruption, as a shell reads it."""
    if isinstance(error, Interrupted) and error.way_on:
        return error.way_on
    repeated = [text for text in arguments if not text.startswith("hydra.sweep.dir=")]
    jobs = sys.modules.get("mifo.config.jobs")
    if jobs and (folder := jobs.sweep_folder()):
        from mifo.config.compose import quoted

        return shlex.join(["mifo", *repeated, f"hydra.sweep.dir={quoted(folder)}"])
    return shlex.join(["mifo", *arguments])


@contextmanager
def _handling(handler: Callable[[int, Any], None], numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Handle these signals within the block, but those that are ignored, as under nohup."""
    before = {number: signal.getsignal(number) for number in STOPS}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)


def _stop(number: int, frame: Any) -> None:
    """End what is done, wherever it is."""
    raise Interrupted(128 + number)


@contextmanager
def _undisturbed() -> Iterator[list[int]]:
    """Hold signals back while a status is written; they count afterwards, unless the list is cleared."""
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield held
        return
    try:
        with _handling(lambda number, frame: held.append(number), STOPS):
            yield held
    finally:
        if held:
            signal.raise_signal(held[0])


class _Lasting(io.FileIO):
    """A stream that forgets what cannot be written, to a closed pipe or a full disk: results matter more."""

    def write(self, data: Any) -> int:
        """Write, or forget what cannot be written."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _keep_output() -> None:
    """Let no output end a run: letters that the terminal lacks become "?", and a reader may leave."""
    logging.raiseExceptions = False  # a log on a full disk would print a trace for each line
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            lasting = io.BufferedWriter(_Lasting(descriptor, "w", closefd=False))
            buffered = {"line_buffering": stream.line_buffering}
            setattr(sys, name, io.TextIOWrapper(lasting, stream.encoding, "replace", **buffered))
