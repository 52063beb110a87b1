"""The life of one job: its own folder, its recorded configuration, its status; and the summary of a sweep."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mifo.config.schema import TaskSettings
from mifo.data.instances import folder_digest
from mifo.errors import MifoError
from mifo.files import write_whole

STATUS = "status.json"
CONFIG = "config.yaml"
COMMAND = "command.json"
# what may differ when a run is continued, since it changes where and how fast, not what
_FREE = {
    "resume",
    "paths",
    "device",
    "performance",
    "trainer",
    "logger",
    "callbacks",
    "tags",
    "group",
    "exclusive_gpu",
    "objectives",
}

_sweep_folder: Path | None = None
_claimed: set[Path] = set()  # folders that hold the runs of this process


class SweepFolder(Callback):
    """Remembers the folder of a sweep, which Hydra tells its callbacks alone."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra in the process that starts the jobs."""
        global _sweep_folder
        _sweep_folder = Path(config.hydra.sweep.dir)


def write_status(folder: Path, status: str, overrides: list[str], error: str | None = None) -> None:
    """Write `status.json` into a job's folder; `status` is running, ok, failed or interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"status": status, "error": error, "overrides": overrides}
    write_whole(folder / STATUS, json.dumps(record, indent=2) + "\n")


def begin_job(folder: Path, overrides: list[str]) -> dict[str, Any] | None:
    """Say that a job begins in this folder; returns the status of the run that it holds already, if any."""
    _claimed.discard(folder)
    before = read_status(folder) if (folder / CONFIG).is_file() else None
    write_status(folder, "running", overrides)
    return before


def end_failed_job(folder: Path, before: dict[str, Any] | None, overrides: list[str], reason: str) -> None:
    """Say that a job failed, unless the run in its folder was another one, which has not."""
    if before and folder not in _claimed:
        write_status(folder, before["status"], before["overrides"], before["error"])
    else:
        write_status(folder, "failed", overrides, reason)


def read_status(folder: Path) -> dict[str, Any] | None:
    """What `status.json` of a job's folder says; None where there is no readable one."""
    try:
        return json.loads((folder / STATUS).read_text())
    except (OSError, ValueError):
        return None


def report_sweep() -> bool:
    """Print how each job of the sweep ended, if there was a sweep; returns whether there was one."""
    global _sweep_folder
    if _sweep_folder is None:
        return False
    folder, _sweep_folder = _sweep_folder, None
    paths = sorted(folder.glob(f"*/{STATUS}"), key=lambda path: (len(path.parent.name), path.parent.name))
    jobs = {path.parent.name: json.loads(path.read_text()) for path in paths}
    everywhere = (
        set.intersection(*(set(job["overrides"]) for job in jobs.values())) if len(jobs) > 1 else set()
    )
    table = Table("job", "status", "overrides", "error", title=str(folder), title_justify="left")
    for name, job in jobs.items():
        colour = {"ok": "green", "failed": "red"}.get(job["status"], "yellow")
        own = " ".join(text for text in job["overrides"] if text not in everywhere)
        table.add_row(name, f"[{colour}]{job['status']}", escape(own), escape(job["error"] or ""))
    if jobs:
        Console().print(table)
    return bool(jobs)


def recorded_overrides(overrides: list[str]) -> list[str]:
    """What was typed for the run that `resume=FOLDER` continues, and that run's folder for its output.

    The process goes on in the folder in which it was typed, so that relative paths mean what they did.

    Raises:
        MifoError: FOLDER is not the folder of a run.
    """
    folder = next(
        (Path(text.removeprefix("resume=")) for text in overrides if text.startswith("resume=")), None
    )
    if folder is None or str(folder) == "null":
        return []
    given, folder = folder, folder.expanduser().absolute()
    command, recorded = folder / COMMAND, folder / ".hydra" / "overrides.yaml"
    if command.is_file():
        known = json.loads(command.read_text())
        typed, where = known["overrides"], Path(known["folder"])
        if where.is_dir():
            os.chdir(where)
    elif recorded.is_file():  # it failed before its folder was its own
        typed = list(OmegaConf.load(recorded))
    else:
        raise MifoError(f"resume={given}: no run to continue there (it lacks {COMMAND}); name a run's folder")
    return [*(text for text in typed if not text.startswith("resume=")), f"hydra.run.dir='{folder}'"]


def claim_folder(settings: TaskSettings) -> Path:
    """Record the resolved configuration in the run's folder, which must be empty or hold this same run.

    Raises:
        MifoError: the folder holds a run of another configuration, or the user's image or masks are no longer
            those that the run began with.
    """
    folder = Path(settings.paths.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG
    mine = OmegaConf.to_container(OmegaConf.create(asdict(settings)), enum_to_str=True)
    if path.is_file():
        before = OmegaConf.to_container(OmegaConf.load(path))
        other = [key for key in {*mine, *before} - _FREE if mine.get(key) != before.get(key)]
        if other:
            raise MifoError(
                f"{folder} holds a run with another {', '.join(sorted(other))}; choose another folder"
            )
    _record_command(folder, settings)
    write_whole(path, OmegaConf.to_yaml(mine))
    _claimed.add(folder)
    return folder


def _record_command(folder: Path, settings: TaskSettings) -> None:
    """Record once what was typed, where, and what the user's image and masks were; refuse others later."""
    command, instances = folder / COMMAND, getattr(settings, "instances", None)
    files = instances and folder_digest(instances)
    if command.is_file():
        if json.loads(command.read_text())["files"] != files:
            raise MifoError(
                f"the image or the masks in {instances.folder} have changed since the run in {folder} began; "
                "choose another folder"
            )
        return
    typed = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    record = {"overrides": typed, "folder": str(Path.cwd()), "files": files}
    write_whole(command, json.dumps(record, indent=2) + "\n")
