"""Commands that the studio starts, and what their folders tell while they run."""

import csv
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from mifo.config.jobs import read_status
from mifo.config.location import fresh_folder
from mifo.data.pictures import read_picture
from mifo.data.saved_pictures import as_image, read_pictures
from mifo.errors import MifoError
from mifo.files import read_text
from mifo.report.palette import PALETTE, hexadecimal
from mifo.tracking.index import Index, near, read_facts

LOG = "studio.log"  # what a command that the studio started prints
COLUMNS = ("status", "task", "instances.name", "choices.model", "method", "seed", "editability", "leakage")


class Jobs:
    """Commands in processes of their own, by their folders. They are stopped as Ctrl-C would stop them."""

    def __init__(self) -> None:
        self._processes: dict[Path, subprocess.Popen[bytes]] = {}

    def start(self, task: str, arguments: Sequence[str]) -> Path:
        """Start `mifo TASK` in a new folder, which is returned."""
        folder = fresh_folder(task)
        self._start(folder, [task, *arguments, f"hydra.run.dir={folder}"])
        return folder

    def resume(self, folder: Path) -> None:
        """Go on with a run that was stopped.

        Raises:
            MifoError: no run is there, or it runs.
        """
        facts = read_facts(folder)
        if self.state(folder)[0] == "running" or "task" not in facts:
            raise MifoError(f"{folder} holds no run that has ended; choose another one to go on with.")
        self._start(folder, [str(facts["task"]), f"resume={folder}"])

    def stop(self, folder: Path) -> None:
        """Ask a command to end; it writes down how it can go on.

        Raises:
            MifoError: this studio did not start it, or it has ended.
        """
        process = self._processes.get(folder)
        if process is None or process.poll() is not None:
            raise MifoError(f"{folder} is not running here; a run of another process is stopped there.")
        process.send_signal(signal.SIGTERM)

    def stop_all(self) -> None:
        """Stop every command and wait for its end."""
        alive = [process for process in self._processes.values() if process.poll() is None]
        for process in alive:
            process.send_signal(signal.SIGTERM)
        for process in alive:
            process.wait()

    def state(self, folder: Path) -> tuple[str, str]:
        """How a run stands, running | ok | failed | interrupted | died, and what it says of that."""
        process, known = self._processes.get(folder), read_status(folder)
        if process is not None and process.poll() is None:
            return "running", ""
        if process is not None and (process.returncode == 2 or (process.returncode and known is None)):
            return "failed", next(iter(re.findall(r"mifo: error: (.*)", tail(folder))[-1:]), "see the log")
        return (known["status"], known["error"] or "") if known else ("", "")

    def _start(self, folder: Path, arguments: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOG, "ab") as log:
            log.write(f"$ {shlex.join(['mifo', *arguments])}\n".encode())
            log.flush()
            self._processes[folder] = subprocess.Popen(
                [sys.executable, "-m", "mifo", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


def tail(folder: Path) -> str:
    """The last lines that a command printed."""
    file = folder / LOG
    return "\n".join(read_text(file).splitlines()[-30:]) if file.is_file() else ""


def curves(folder: Path) -> str:
    """The total loss of a run of learning as an SVG, the second stage after the first in another colour."""
    found: dict[str, dict[int, float]] = {"semantic": {}, "finetuning": {}}
    for file in sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda file: file.stat().st_mtime):
        with suppress(MifoError, ValueError, KeyError):  # it is being written
            for row in csv.DictReader(read_text(file).splitlines()):
                for stage, each in found.items():
                    if (loss := row.get(f"{stage}/loss/total")) and row["step"]:
                        each[int(row["step"]) + 1] = float(loss)
    losses = [loss for each in found.values() for loss in each.values()]
    if len(losses) < 2:
        return ""
    first = max(found["semantic"], default=0)
    steps, top = first + max(found["finetuning"], default=0), max(losses) or 1
    lines = ""
    for number, (stage, each) in enumerate(found.items()):
        points = [
            f"{(step + number * first) / steps * 900:.1f},{160 - loss / top * 150:.1f}"
            for step, loss in sorted(each.items())
        ]
        colour, told = hexadecimal(PALETTE[number]), f"loss of the {stage} stage" if points else ""
        lines += f"<polyline points='{' '.join(points)}' stroke='{colour}'/>"
        lines += f"<text x='{190 * number}' y='184' style='fill:{colour}'>{told}</text>"
    return (
        f"<svg class='curves' viewBox='-50 0 960 190'><path d='M0 5V160H900'/>{lines}<text x='-48' y='18'>"
        f"{top:.2g}</text><text x='-16' y='164'>0</text>"
        f"<text x='900' y='184' text-anchor='end'>step {steps}</text></svg>"
    )


def pictures(folder: Path) -> list[tuple[Image.Image, str]]:
    """A run's contact sheet and its pictures with their seeds, or the newest of those made in learning."""
    found: list[tuple[Image.Image, str]] = []
    if (folder / "pictures" / "pictures.json").is_file():
        if (sheet := folder / "contact_sheet.png").is_file():
            found.append((read_picture(sheet), "contact sheet"))
        for each in read_pictures(folder / "pictures"):
            found.append((as_image(each.image), f"seed {each.seed}"))
        return found
    made = folder.glob("learning/samples/*.png")
    for file in sorted(made, key=lambda file: file.stat().st_mtime, reverse=True)[:12]:
        stage, _, step = file.stem.rpartition("-")
        with suppress(MifoError):  # it is being written
            found.append((read_picture(file), f"{stage}, step {step.lstrip('0')}"))
    return found


def runs(learned: bool = False) -> list[tuple[str, str]]:
    """Title and folder of the runs that `mifo results` lists, or of those that learned, the newest first."""
    index = Index()
    names = index.column("instances.name")
    return [
        (f"{names.get(index.runs[run], '')} · {Path(run).parent.name} {Path(run).name[:19]}", near(run))
        for run in _newest(index)
        if not learned or (Path(run) / "learned").is_dir()
    ]


def table() -> dict[str, list[Any]]:
    """The runs that `mifo results` lists, with settings and scores."""
    index = Index()
    columns = {key.rpartition(".")[2]: index.column(key) for key in COLUMNS if index.has(key)}
    rows = [[near(run), *(each.get(index.runs[run]) for each in columns.values())] for run in _newest(index)]
    return {"headers": ["folder", *columns], "data": rows}


def _newest(index: Index) -> list[str]:
    return sorted(index.runs, key=lambda run: Path(run).name, reverse=True)
