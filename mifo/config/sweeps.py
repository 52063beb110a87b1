"""Sweeps that resume by themselves: jobs with one signature are one run, made once, in whichever folder.

`multirun/.runs/SIGNATURE` is locked while the job runs, and holds a link to its folder. Where `.runs` was
deleted, sweeps know no runs of other sweeps; nothing else is lost.
"""

import os
from itertools import chain, count
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from mifo.config.compose import as_plain, settings_of
from mifo.config.identity import code_version, run_signature
from mifo.config.jobs import lock_folder, state_of, unlock_folder
from mifo.config.resume import read_settings, recorded_command
from mifo.data.photo_folder import folder_digest
from mifo.errors import MifoError
from mifo.files import COMMAND, CONFIG, read_json

_RESULTS = {"learn": "learned/learned.json", "run": "scores.json"}  # of the tasks that are never done twice
_LINK = "run"
_same: set[Path] = set()  # folders of this process's jobs that are known to hold the run that is asked for


def place_of_job(*, _root_: DictConfig) -> str:
    """`${place_of_job:}` in `hydra.sweep.subdir`: the folder of the run that the job is, or a new one.

    A folder is new if its number is that of the job, or the next one that is free. While another process
    makes the same run, the job waits. What is locked stays so until the job ends.
    """
    config, number = _root_, _root_.hydra.job.num
    sweep = Path(os.path.abspath(config.hydra.sweep.dir))
    if config.task not in _RESULTS:
        return str(number)
    try:
        mine = None if config.again else signature(config)
        known = None
        if mine is not None:
            known = _known(config, mine)
            lock_folder(known.parent, wait=True)
        found = [known.resolve()] if known is not None and known.is_dir() else []
        numbered = (sweep / str(each) for each in count(number))
        folder = next(each for each in chain(found, numbered) if _take(each, config.task, mine))
        if known is not None:
            _link(known, folder)
        if sweep not in folder.parents:
            _show(sweep, number, folder)
        return str(folder)
    except OSError:  # Hydra meets it too and says so
        return str(number)


def register_place_of_job() -> None:
    """Make `${place_of_job:}` known to OmegaConf."""
    OmegaConf.register_new_resolver("place_of_job", place_of_job, replace=True)


def is_kept(folder: Path, config: DictConfig) -> bool:
    """Whether the run that `config` asks for is finished in `folder`."""
    if config.task not in _RESULTS or state_of(folder) != "ok":
        return False
    try:
        if config.task == "learn" or config.metrics is not None:
            read_json(folder / _RESULTS[config.task])
    except MifoError:
        return False
    return folder in _same or _recorded(folder, config.task) == signature(config)


def remember(config: DictConfig, folder: Path) -> None:
    """Let sweeps find a finished run that no sweep began."""
    if config.task in _RESULTS and not config.resume and (mine := signature(config)):
        known = _known(config, mine)
        known.parent.mkdir(parents=True, exist_ok=True)
        _link(known, folder)


def signature(config: DictConfig) -> str | None:
    """The hash that equal runs share, whatever code made them; None for a configuration that is refused."""
    plain = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    with open_dict(plain):
        plain.paths.output = "unknown"
    try:
        settings = settings_of(plain)
        return run_signature(as_plain(settings), folder_digest(settings.instances))
    except MifoError:
        return None


def _recorded(folder: Path, task: str) -> str | None:
    """The signature of the run of `task` in a folder; None where there is none that can be read."""
    try:
        known = recorded_command(folder)
        return known.signature or run_signature(read_settings(folder, task), known.files)
    except MifoError:
        return None


def _known(config: DictConfig, mine: str) -> Path:
    return Path(config.paths.multirun).absolute() / ".runs" / f"{mine}-{code_version().digest}" / _LINK


def _take(folder: Path, task: str, mine: str | None) -> bool:
    """Lock a folder that holds the run `mine` or none; whether that was possible."""
    try:
        lock_folder(folder)
    except (MifoError, FileExistsError):  # in use, or no folder
        return False
    # a run that is killed at its very beginning has the one file and not yet the other
    begun = any((folder / name).exists() for name in (COMMAND, CONFIG)) or state_of(folder) == "ok"
    _same.discard(folder)
    if begun and mine is not None and _recorded(folder, task) == mine:
        _same.add(folder)
    if not begun or folder in _same:
        return True
    unlock_folder(folder)
    return False


def _link(link: Path, folder: Path) -> None:
    """Let `link` lead to `folder`, whole or not at all; both can be moved together."""
    if link.resolve() != folder.resolve():
        unfinished = link.with_name(f".{link.name}.{os.getpid()}")
        unfinished.unlink(missing_ok=True)
        unfinished.symlink_to(os.path.relpath(folder, link.parent))
        unfinished.replace(link)


def _show(sweep: Path, number: int, folder: Path) -> None:
    """Put a link to a run of another sweep beside the runs of this one, under the first free number."""
    sweep.mkdir(parents=True, exist_ok=True)
    for each in count(number):
        link = sweep / str(each)
        try:
            return link.symlink_to(os.path.relpath(folder, sweep))
        except FileExistsError:
            if link.resolve() == folder:
                return None
