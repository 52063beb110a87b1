"""Making the runs that are missing: several at once in processes of their own, none twice."""

import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mifo.config.compose import compose, settings_of
from mifo.config.gpus import visible_gpus
from mifo.config.jobs import read_status, write_status
from mifo.config.launch import perform
from mifo.errors import MifoError
from mifo.files import read_record, whole_folder, write_whole
from mifo.metrics.evaluation import SCORES, Evaluation
from mifo.tables.plan import Run, code_version
from mifo.tables.record import About, Entry
from mifo.tables.worker import LOG, Worker

ABOUT = "table_run.json"


@dataclass(frozen=True)
class Done:
    """How a run ended: its folder, or what a record kept of it, or why there is neither."""

    run: Run
    folder: Path | None
    error: str | None = None
    kept: Entry | None = None

    @property
    def is_finished(self) -> bool:
        return self.folder is not None or self.kept is not None

    def entry(self) -> Entry:
        """What a record says of it. Raises MifoError when the scores of a finished run cannot be read."""
        return self.kept or _entry(self.folder)


def finished(runs: Sequence[Run], pool: Path, any_code: bool, record: Mapping[str, Entry]) -> list[Done]:
    """How each of `runs` ended so far; none is made. Arguments as of `execute`."""
    return [
        (run.settings and _done(run, pool, any_code, record)) or Done(run, None, run.error or "not made yet")
        for run in runs
    ]


def execute(
    runs: Sequence[Run],
    pool: Path,
    workers: int | None,
    any_code: bool,
    record: Mapping[str, Entry],
) -> list[Done]:
    """Make what is missing of `runs` in folders of `pool`, and say how each of them ended.

    A run's folder is named by its configuration and the code's version: one that is finished is not made
    again, one that was interrupted or failed is continued. Runs that differ after learning alone learn once.

    Args:
        workers: processes at once, spread over the GPUs; 0: here, one by one; None: one per GPU, or one.
        any_code: a finished run of the same configuration counts, whatever code made it.
        record: runs of an earlier table by their configuration, which count as they are.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.settings is not None:
            groups.setdefault(run.learning_key, []).append(run)
    gpus = visible_gpus()
    count = max(1, len(gpus)) if workers is None else workers
    threads = max(1, (os.cpu_count() or 1) // max(1, count))
    staff = [Worker(gpus[number % len(gpus)] if gpus else None, threads) for number in range(count)]
    free: SimpleQueue[Worker | None] = SimpleQueue()
    for worker in staff or [None]:
        free.put(worker)
    ended = {run: Done(run, None, run.error) for run in runs}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("runs", total=sum(map(len, groups.values())))

        def make(group: list[Run]) -> None:
            worker = free.get()
            try:
                for run in group:
                    ended[run] = _done(run, pool, any_code, record) or _make(run, group, pool, worker)
                    if ended[run].error:
                        progress.console.print(
                            f"failed: {run}: {ended[run].error}", style="red", markup=False
                        )
                    progress.advance(bar)
            finally:
                free.put(worker)

        with _stopping(staff), ThreadPoolExecutor(max(1, count)) as pool_of_threads:
            futures = [pool_of_threads.submit(make, group) for group in groups.values()]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool_of_threads.shutdown(wait=False, cancel_futures=True)
                for worker in staff:
                    worker.stop()
                raise
        for worker in staff:
            worker.close()
    return [ended[run] for run in runs]


def _done(run: Run, pool: Path, any_code: bool, record: Mapping[str, Entry]) -> Done | None:
    """A run that is finished already, by its folder before its record."""
    folder, kept = _finished_folder(run, pool, any_code), record.get(run.key)
    return Done(run, folder, None, None if folder else kept) if folder or kept else None


def _make(run: Run, group: list[Run], pool: Path, worker: Worker | None) -> Done:
    folder = _folder(run, pool)
    folder.mkdir(parents=True, exist_ok=True)
    job = (folder, run, [_folder(other, pool) for other in group])
    code = worker.make(*job) if worker else make_here(*job)
    if code is not None:
        reason = f"the process ended with {code}; see {folder / LOG}"
        write_status(folder, "failed", list(run.overrides), reason)
    if _is_done(folder):
        return Done(run, folder)
    return Done(run, None, (read_status(folder) or {}).get("error") or f"interrupted; see {folder / LOG}")


def make_here(folder: Path, run: Run, others: Sequence[Path]) -> None:
    """Make a run in this process, unless another one has made it meanwhile; see its `status.json`.

    Args:
        others: folders of runs that learn the same, whose result is taken over.
    """
    with _locked(folder):
        if _is_done(folder):
            return
        _borrow_learned(folder, others)
        _run_here(run, folder)


def _run_here(run: Run, folder: Path) -> None:
    write_status(folder, "running", list(run.overrides))
    started = time.monotonic()
    try:
        perform(settings_of(compose("run", [*run.overrides, f"paths.output='{folder}'"])))
        error = None
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    seconds = round(time.monotonic() - started + _seconds_before(folder), 1)
    about = About(**asdict(code_version()), seconds=seconds, overrides=list(run.overrides))
    write_whole(folder / ABOUT, json.dumps(asdict(about), indent=2) + "\n")
    write_status(folder, "failed" if error else "ok", list(run.overrides), error)


def _borrow_learned(folder: Path, others: Sequence[Path]) -> None:
    """Take over what a run with the same learning has learned, as hard links."""
    source = next((other / "learned" for other in others if (other / "learned").is_dir()), None)
    if source is None or (folder / "learned").exists():
        return
    with whole_folder(folder / "learned") as unfinished:
        shutil.copytree(source, unfinished, copy_function=os.link, dirs_exist_ok=True)


def _finished_folder(run: Run, pool: Path, any_code: bool) -> Path | None:
    """Where a run lies finished, made by the present code if it did, or None."""
    others = sorted(pool.glob(f"{run.key}-*")) if any_code else []
    return next(filter(_is_done, [_folder(run, pool), *others]), None)


def _folder(run: Run, pool: Path) -> Path:
    return pool.absolute() / f"{run.key}-{code_version().digest}"


def _is_done(folder: Path) -> bool:
    """Whether a run is finished; one whose files are damaged is made again from what is left of it."""
    if (read_status(folder) or {}).get("status") != "ok":
        return False
    try:
        _entry(folder)
    except MifoError:
        return False
    return True


def _entry(folder: Path) -> Entry:
    return Entry(folder.name, Evaluation.read(folder / SCORES).scores, _about(folder))


def _about(folder: Path) -> About | None:
    path = folder / ABOUT
    return read_record(path, About) if path.exists() else None


def _seconds_before(folder: Path) -> float:
    """How long earlier attempts at a run took; none where their record is damaged."""
    try:
        about = _about(folder)
    except MifoError:
        return 0.0
    return about.seconds if about else 0.0


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process works in `folder`, and keep others out as long as this one lives."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _stopping(staff: Sequence[Worker]) -> Iterator[None]:
    """A request to end this process ends its runs too."""
    if not staff or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
