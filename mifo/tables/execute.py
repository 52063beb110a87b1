"""Making the runs that are missing, through a launcher of Hydra or in this process; none twice."""

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import cast

import torch

from mifo.config.compose import compose, settings_of, written
from mifo.config.identity import code_version
from mifo.config.jobs import lock_folder, read_status, state_of, unlock_folder, write_status
from mifo.config.launch import Launch, perform
from mifo.config.schema import RunSettings
from mifo.errors import MifoError, root_cause, told
from mifo.files import STATUS, read_record, whole_folder, write_whole
from mifo.metrics.scores import SCORES, Evaluation
from mifo.tables.plan import Run
from mifo.tables.record import About, Entry

ABOUT, LOG = "table_run.json", "log.txt"

_UNDER_WAY = {"running", "died", "interrupted"}

# of a run to be made: what it is called, its folder, its overrides, its table, row and set
Missing = tuple[str, Path, tuple[str, ...], dict[str, str | None]]
Group = tuple[list[Missing], list[Path]]  # of runs that learn the same: those to be made, the folders of all


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
        if self.kept is not None:
            return self.kept
        assert self.folder is not None  # it is finished
        return _entry(self.folder)


def finished(runs: Sequence[Run], pool: Path, any_code: bool, record: Mapping[str, Entry]) -> list[Done]:
    """How each of `runs` ended so far; none is made. Arguments as of `execute`."""
    return [
        (run.settings and _done(run, pool, any_code, record))
        or Done(run, None, run.error or _why_not(_folder(run, pool)))
        for run in runs
    ]


def execute(
    runs: Sequence[Run], pool: Path, launch: Launch, per_job: int, any_code: bool, record: Mapping[str, Entry]
) -> list[Done]:
    """Make what is missing of `runs` in folders of `pool`, and say how each of them ended.

    A run's folder is named by its configuration and the code's version: one that is finished is not made
    again, one that was interrupted or failed is continued. Runs that differ after learning alone learn once.

    Args:
        launch: calls `make_runs` with the groups of each job.
        per_job: how many groups of runs that learn the same go to one job.
        any_code: a finished run of the same configuration counts, whatever code made it.
        record: runs of an earlier table by their configuration, which count as they are.
    """
    found: dict[str, dict[str, Run]] = {}  # by what they learn, then by what they are
    for run in runs:
        if run.settings is not None:
            found.setdefault(run.learning_key, {}).setdefault(run.key, run)
    number, total = count(1), sum(map(len, found.values()))
    groups: list[Group] = []
    for same in found.values():
        named = [(f"{next(number)} of {total}: {run}", run) for run in same.values()]
        left = [(label, run) for label, run in named if not _done(run, pool, any_code, record)]
        missing = [
            (label, _folder(run, pool), run.overrides, cast(RunSettings, run.settings).origin.place)
            for label, run in left
        ]
        for _, folder, *_ in missing:
            if state_of(folder) != "running":  # how it ended before says nothing of this attempt
                (folder / STATUS).unlink(missing_ok=True)
        if missing:
            groups.append((missing, [_folder(run, pool) for run in same.values()]))
    if groups:
        _launch([groups[first : first + per_job] for first in range(0, len(groups), per_job)], launch)
    return finished(runs, pool, any_code, record)


def _launch(jobs: Sequence[list[Group]], launch: Launch) -> None:
    """Launch all jobs, also where a process dies and its launcher gives up the others.

    Raises:
        MifoError: the launcher fails without any run being under way.
    """
    try:
        launch(jobs)
    except Exception as error:
        states = [{state_of(folder) for missing, _ in job for _, folder, *_ in missing} for job in jobs]
        broken = [job for job, state in zip(jobs, states, strict=True) if state & _UNDER_WAY]
        if not broken:
            raise MifoError(f"the launcher failed: {root_cause(error)}; the same command goes on") from error
        for missing, folders in chain.from_iterable(broken):
            for run in missing:  # one at a time: the run that kills its process stops no other
                with suppress(Exception):
                    launch([[([run], folders)]])
        if rest := [job for job, state in zip(jobs, states, strict=True) if state == {None}]:
            _launch(rest, launch)


def make_runs(*groups: Group) -> None:
    """Make runs one after the other, in whichever process; their `status.json` say how they ended."""
    for missing, folders in groups:
        for label, folder, overrides, place in missing:
            folder.mkdir(parents=True, exist_ok=True)
            lock_folder(folder, wait=True)
            try:
                if not _is_done(folder):
                    _borrow_learned(folder, folders)
                    with _logged(folder / LOG):
                        _make(folder, list(overrides), place)
            finally:
                unlock_folder(folder)
            error = _why_not(folder)
            print(f"{label}: {f'failed: {error}' if error else 'ok'}", flush=True)
            # Lightning's objects refer to each other, so that a run's weights would linger
            gc.collect()
            torch.cuda.empty_cache()


def _make(folder: Path, overrides: list[str], place: dict[str, str | None]) -> None:
    write_status(folder, "running", overrides)
    started = time.monotonic()
    status, error = "ok", None
    try:
        perform(settings_of(compose("run", [*overrides, f"paths.output={written(folder)}"], **place)))
    except Exception as raised:
        status, error = "failed", told(raised)
    except BaseException:
        write_status(folder, "interrupted", overrides, "stopped by a signal; the same command continues it")
        raise
    seconds = time.monotonic() - started
    with suppress(MifoError):  # a damaged record of earlier attempts says nothing
        seconds += before.seconds if (before := _about(folder)) else 0
    about = About(**asdict(code_version()), seconds=round(seconds, 1), overrides=overrides)
    write_whole(folder / ABOUT, json.dumps(asdict(about), indent=2) + "\n")
    write_status(folder, status, overrides, error)


def _done(run: Run, pool: Path, any_code: bool, record: Mapping[str, Entry]) -> Done | None:
    """A run that is finished already, by its folder before its record."""
    others = sorted(pool.glob(f"{run.key}-*")) if any_code else []
    folder, kept = next(filter(_is_done, [_folder(run, pool), *others]), None), record.get(run.key)
    return Done(run, folder, None, None if folder else kept) if folder or kept else None


def _why_not(folder: Path) -> str | None:
    """Why a run has no result; None where it has one."""
    known = read_status(folder)
    if known is None:
        return "not made yet"
    if known["status"] == "ok":
        return None if _is_done(folder) else "its scores are damaged or missing"
    return known["error"] or f"{known['status']}; see {folder / LOG}"


def _borrow_learned(folder: Path, others: Sequence[Path]) -> None:
    """Take over what a run with the same learning has learned, as hard links."""
    source = next((other / "learned" for other in others if (other / "learned").is_dir()), None)
    if source is None or (folder / "learned").exists():
        return
    with whole_folder(folder / "learned") as unfinished:
        shutil.copytree(source, unfinished, copy_function=os.link, dirs_exist_ok=True)


def _folder(run: Run, pool: Path) -> Path:
    return pool.absolute() / f"{run.key}-{code_version().digest}"


def _is_done(folder: Path) -> bool:
    """Whether a run is finished; one whose files are damaged is made again from what is left of it."""
    if state_of(folder) != "ok":
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


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Add what this process says, and the libraries in it, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(stream) for stream in (1, 2)]
    with open(path, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, kept in zip((1, 2), before, strict=True):
            os.dup2(kept, stream)
            os.close(kept)
