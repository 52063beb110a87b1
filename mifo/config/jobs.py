"""The life of one job: its own folder, its recorded configuration, its status; and the summary of a sweep."""

import fcntl
import hashlib
import json
import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mifo.config.compose import as_plain, explain, key_of
from mifo.config.identity import code_version, run_signature
from mifo.config.resume import FREE, Command, read_settings
from mifo.config.schema import Origin, TaskSettings
from mifo.data.photo_folder import folder_digest
from mifo.errors import MifoError, refuse
from mifo.files import COMMAND, CONFIG, LOCKLESS, STATUS, read_record, remove, whole_file, write_whole

LOCK = ".lock"

swept: list[str] = []  # the keys that the sweep of this process's job varies
_sweep_folder: Path | None = None
_claimed: set[Path] = set()  # folders that hold the runs of this process
_locks: dict[Path, int] = {}  # folder → file descriptor; the lock ends with the process, however it ends
_BEAT, _SILENCE = 60, 600  # seconds between signs of life, and without one until a process counts as dead


@dataclass(frozen=True)
class Status:
    """How a job stands. While it runs, its process, by which a job that was killed can be told."""

    status: str  # running | ok | failed | interrupted
    error: str | None
    overrides: list[str]
    pid: int | None = None
    host: str | None = None
    started: str | None = None


class FoldersOfHydra(Callback):
    """Knows a run's or a sweep's folder before Hydra writes there."""

    def __init__(self) -> None:
        self.swept: list[str] = []

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Lock the folder of a single run."""
        try:
            lock_folder(Path(os.path.abspath(config.hydra.run.dir)))
        except (MifoError, OSError) as error:  # Hydra would only warn of it
            refuse(explain(error, config.task))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra in the process that starts the jobs; remembers the folder for the summary."""
        global _sweep_folder
        _sweep_folder = Path(os.path.abspath(config.hydra.sweep.dir))
        given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        self.swept = [each.key_or_group for each in given if each.is_sweep_override()]
        self.swept += config.hydra.sweeper.get("params") or []

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra in the process of a job, to which this object travels."""
        global swept
        swept = self.swept


def lock_folder(folder: Path, wait: bool = False) -> None:
    """Keep other processes out of a job's folder until `unlock_folder`, or until this process ends.

    A thread of this process touches the lock file every minute: a sign of life for other hosts.

    Args:
        wait: for the end of another process that works there.

    Raises:
        MifoError: another process works there, and is not waited for.
    """
    folder = Path(os.path.realpath(folder))
    if folder in _locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        # on a file system without locks the signs of life of a run must do
        lockless = error.errno in LOCKLESS
        if not lockless or state_of(folder) == "running":
            os.close(handle)
            if not lockless and not isinstance(error, BlockingIOError):
                raise
            raise MifoError(
                f"{folder} is in use by another process; wait for its end, or choose another folder"
            ) from None
    except BaseException:  # a signal, while it waits
        os.close(handle)
        raise
    os.utime(handle)
    _locks[folder] = handle
    _start_beating(os.getpid())


@cache
def _start_beating(process: int) -> None:
    """Show other hosts by the times of the lock files that this process lives; once a process."""

    def beat() -> None:
        while True:
            time.sleep(_BEAT)
            for handle in list(_locks.values()):
                with suppress(OSError):
                    os.utime(handle)

    Thread(target=beat, daemon=True).start()


def unlock_folder(folder: Path) -> None:
    """Let other processes in again."""
    if (handle := _locks.pop(Path(os.path.realpath(folder)), None)) is not None:
        os.close(handle)


def unlock_folders() -> None:
    """Let other processes into all folders of the job that ends."""
    for folder in list(_locks):
        unlock_folder(folder)


def write_status(folder: Path, status: str, overrides: list[str], error: str | None = None) -> None:
    """Write `status.json` into a job's folder; `status` is running, ok, failed or interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    process = (os.getpid(), socket.gethostname(), now) if status == "running" else ()
    record = asdict(Status(status, error, overrides, *process))
    told = {name: value for name, value in record.items() if value is not None or name == "error"}
    write_whole(folder / STATUS, json.dumps(told, indent=2) + "\n")


def state_of(folder: Path) -> str | None:
    """The status running | ok | failed | interrupted | died of a job's folder; None where it has none."""
    return (read_status(folder) or {}).get("status")


def read_status(folder: Path) -> dict[str, Any] | None:
    """What `status.json` of a job's folder says; None where there is no readable one.

    A job whose process has gone without a word has the status "died": on this host there is no such process,
    on others it gave no sign of life for ten minutes.
    """
    try:
        known = read_record(folder / STATUS, Status)
    except MifoError:
        return None
    if known.status != "running":
        return asdict(known)
    if known.host == socket.gethostname():
        # another process may have the number of one that died
        died = not (_is_alive(known.pid or 0) and _is_locked(folder / LOCK))
    else:
        lock = folder / LOCK
        died = lock.is_file() and time.time() - lock.stat().st_mtime > _SILENCE
    reason = f"process {known.pid} ended without a word, as by a kill or a power cut; it can be continued"
    return asdict(known) | ({"status": "died", "error": reason} if died else {})


def _is_locked(lock: Path) -> bool:
    """Whether a process holds the lock; true where nobody can tell."""
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(handle)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(max(pid, 1), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


class Job:
    """A job in its folder, which is locked and cleaned of what a killed process left half written."""

    def __init__(self, folder: Path, overrides: list[str], alone: bool) -> None:
        """
        Args:
            alone: the job belongs to no sweep. A run in the folder then counts as another run until its
                configuration is known to be the same.

        Raises:
            MifoError: another process works in the folder.
        """
        lock_folder(folder)
        _claimed.discard(folder)
        self.folder, self.overrides = folder, overrides
        path, known = folder / STATUS, (folder / CONFIG).is_file()
        self._before = path.read_bytes() if known and alone and path.is_file() else None
        if known:
            for rubbish in list(folder.rglob(".*.unfinished")):
                remove(rubbish)

    def tell(self, status: str, reason: str | None = None) -> None:
        """Record how the job stands."""
        write_status(self.folder, status, self.overrides, reason)

    def stop(self, code: int) -> None:
        """Record that the signal of this exit code ended the job."""
        self.tell("interrupted", f"stopped by {signal.Signals(code - 128).name}; it can be continued")

    def fail(self, reason: str) -> None:
        """Record that the job failed, unless the run in its folder was another one, which has not."""
        if self._before is not None and self.folder not in _claimed:
            with whole_file(self.folder / STATUS) as unfinished:
                unfinished.write_bytes(self._before)
        else:
            self.tell("failed", reason)


def sweep_folder() -> Path | None:
    """The folder of the sweep that this process began and did not report yet."""
    return _sweep_folder


def report_sweep() -> bool:
    """Print how each job of the sweep ended, if there was one; returns whether a job of it has a status."""
    global _sweep_folder
    if _sweep_folder is None:
        return False
    folder, _sweep_folder = _sweep_folder, None
    # a job's folder may lie deeper, as with hydra.sweep.subdir='${method}/seed_${seed}'
    linked = [path / STATUS for path in folder.glob("*") if path.is_symlink()]  # made by another sweep
    found = {
        str(path.parent.relative_to(folder)): status
        for path in (*folder.rglob(STATUS), *linked)
        if (status := read_status(path.parent))
    }
    jobs = dict(sorted(found.items(), key=lambda job: (len(job[0]), job[0])))
    everywhere = (
        set.intersection(*(set(job["overrides"]) for job in jobs.values())) if len(jobs) > 1 else set()
    )
    table = Table("job", "status", title=escape(str(folder)), title_justify="left")
    for text in ("overrides", "error"):
        table.add_column(text, overflow="fold")
    for name, job in jobs.items():
        colour = {"ok": "green", "failed": "red"}.get(job["status"], "yellow")
        own = " ".join(text for text in job["overrides"] if text not in everywhere)
        table.add_row(escape(name), f"[{colour}]{job['status']}", escape(own), escape(job["error"] or ""))
    if jobs:
        Console().print(table)
    return bool(jobs)


def claim_folder(settings: TaskSettings) -> Path:
    """Record the resolved configuration in the run's folder, which must be empty or hold this same run.

    Raises:
        MifoError: the folder holds a run of another configuration, or the user's image or masks are no longer
            those that the run began with.
    """
    folder = Path(settings.paths.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG
    code = code_version()
    settings.origin.code, settings.origin.dirty = code.name, code.dirty
    mine = as_plain(settings)
    if path.is_file():
        before = read_settings(folder, settings.task)
        if before["origin"]["code"]:  # else it is of a version that recorded none
            mine["origin"] = before["origin"]
            settings.origin = Origin(**before["origin"])
        other = [key for key in {*mine, *before} - FREE if mine.get(key) != before.get(key)]
        if other:
            raise MifoError(
                f"{folder} holds a run with another {', '.join(sorted(other))}; choose another folder"
            )
    _record_command(folder, settings)
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(mine)))
    _claimed.add(folder)
    return folder


def _record_command(folder: Path, settings: TaskSettings) -> None:
    """Record once what was typed, where, and what the user's image and masks were; refuse others later."""
    command, instances = folder / COMMAND, getattr(settings, "instances", None)
    files = folder_digest(instances) if instances else None
    kind = {"synthesize": "learned", "export": "learned", "evaluate": "pictures"}.get(settings.task)
    source = kind and getattr(settings, kind)
    if kind and source:
        files = _source_digest(kind, source if isinstance(source, list) else [source], files)
    if command.is_file() and (folder / CONFIG).is_file():
        before = read_record(command, Command).files
        if before != files and not (source and before is None):  # earlier versions recorded no source
            what = f"{kind}={source}" if source else "the image or the masks"
            raise MifoError(
                f"{what} changed since the run in {folder} began; choose another folder for the new run"
            )
        return
    signature = run_signature(as_plain(settings), files) if instances else None
    typed = [text for text in settings.origin.overrides if key_of(text) != "paths.output"]
    record = asdict(Command(typed, str(Path.cwd()), files, signature))
    write_whole(command, json.dumps(record, indent=2) + "\n")


def _source_digest(kind: str, folders: list[str], files: str | None) -> str:
    """A hash of the learned results or the pictures that a run reads, which may be made anew in one place."""
    digest = hashlib.sha256(str(files).encode())
    for folder in (Path(each).expanduser() for each in folders):
        inside = folder / kind if (folder / kind).is_dir() else folder
        for path in (inside / f"{kind}.json", *sorted(inside.glob("*.png"))):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
