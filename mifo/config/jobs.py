"""The life of one job: its own folder, its recorded configuration, its status; and the summary of a sweep."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mifo.config.schema import TaskSettings
from mifo.errors import MifoError
from mifo.files import write_whole

STATUS = "status.json"
CONFIG = "config.yaml"
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


class SweepFolder(Callback):
    """Remembers the folder of a sweep, which Hydra tells its callbacks alone."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra in the process that starts the jobs."""
        global _sweep_folder
        _sweep_folder = Path(config.hydra.sweep.dir)


def write_status(folder: Path, status: str, overrides: list[str], error: str | None = None) -> None:
    """Write `status.json` into a job's folder; `status` is running, ok or failed."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"status": status, "error": error, "overrides": overrides}
    (folder / STATUS).write_text(json.dumps(record, indent=2) + "\n")


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

    Raises:
        MifoError: FOLDER is not the folder of a run.
    """
    folder = next(
        (Path(text.removeprefix("resume=")) for text in overrides if text.startswith("resume=")), None
    )
    if folder is None or str(folder) == "null":
        return []
    recorded = folder / ".hydra" / "overrides.yaml"
    if not recorded.is_file():
        raise MifoError(
            f"resume={folder}: no run to continue there (it lacks .hydra/overrides.yaml); name a run's folder"
        )
    typed = [text for text in OmegaConf.load(recorded) if not text.startswith("resume=")]
    return [*typed, f"hydra.run.dir='{folder}'"]


def claim_folder(settings: TaskSettings) -> Path:
    """Record the resolved configuration in the run's folder, which must be empty or hold this same run.

    Raises:
        MifoError: the folder holds a run of another configuration.
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
    write_whole(path, OmegaConf.to_yaml(mine))
    return folder
