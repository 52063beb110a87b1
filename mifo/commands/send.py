"""`table.send=true`: sends finished runs, each once, and their table to Weights & Biases."""

import os
from collections.abc import Sequence
from pathlib import Path

import wandb
from lightning.pytorch.loggers import Logger
from rich.progress import track

from mifo.commands.setup import has_wandb_key, open_logger, open_loggers
from mifo.config.compose import compose, settings_of, written
from mifo.config.jobs import lock_folder, unlock_folder
from mifo.config.schema import RunSettings
from mifo.data.instances import read_instances
from mifo.data.saved_pictures import read_pictures
from mifo.errors import MifoError
from mifo.files import finite_number, read_csv, reason
from mifo.metrics.scores import SCORES, Evaluation
from mifo.tables.execute import Done
from mifo.tracking.results import log_evaluation, log_learned, log_table

_BEGUN = ".sending"  # in a folder of which not all was sent


def send(name: str, title: str, table: Path, ended: Sequence[Done]) -> None:
    """Send what is finished and was not sent, and the table `name` that was written into the folder `table`.

    A run that was logged while it was made, or sent before by whichever table, is not sent again. One whose
    sending was interrupted goes on under its id.

    Raises:
        MifoError: the server does not take it.
    """
    try:
        _send_all(name, title, table, ended)
    except wandb.errors.Error as error:
        raise MifoError(
            f"Weights & Biases did not take everything ({reason(error)}); repeat the command to send the rest"
        ) from error


def _send_all(name: str, title: str, table: Path, ended: Sequence[Done]) -> None:
    finished = [(done, done.folder, done.run.settings) for done in ended if done.folder and done.run.settings]
    count = 0
    for done, folder, planned in track(finished, "sending"):
        lock_folder(folder, wait=True)
        try:
            told = (folder / "wandb_id.txt").is_file() and not (folder / _BEGUN).is_file()
            if not told:
                _send(folder, _settings(done, folder, planned))
                count += 1
        finally:
            unlock_folder(folder)
    print(f"sent: {count} runs, and {len(finished) - count} were there before")
    if finished:
        _send_table(name, title, table, _settings(*finished[0]))


def _settings(done: Done, folder: Path, planned: RunSettings) -> RunSettings:
    """The settings of a finished run, with a logger of Weights & Biases and the code that made the run."""
    chosen = [] if "wandb" in planned.logger else ["logger=wandb"]
    given = [*done.run.overrides, *chosen, f"paths.output={written(folder)}"]
    settings: RunSettings = settings_of(compose("run", given, **planned.origin.place))
    settings.logger = {"wandb": settings.logger["wandb"]}
    if (about := done.entry().about) is not None:
        settings.origin.code, settings.origin.dirty = about.commit or about.digest, about.code.dirty
    return settings


def _send(folder: Path, settings: RunSettings) -> None:
    (folder / _BEGUN).touch()
    evaluation, pictures = Evaluation.read(folder / SCORES), read_pictures(folder / "pictures")
    instances = read_instances(settings.instances)
    with open_loggers(settings) as loggers:
        for path in sorted(folder.glob("csv/**/metrics.csv")):
            log_curves(loggers, path)
        if (folder / "learned").is_dir():
            log_learned(loggers, folder / "learned", settings.told_result(instances.name), settings.group)
        log_evaluation(loggers, evaluation, pictures, instances, settings.learning.last_step)
    (folder / _BEGUN).unlink()


def log_curves(loggers: Sequence[Logger], path: Path) -> None:
    """Send what the CSV logger wrote to `path` while a run learned; refuses a damaged file."""
    for row in read_csv(path, {"step": int}):
        try:
            values = {
                key: finite_number(text) for key, text in row.items() if text and key not in ("step", "epoch")
            }
        except ValueError as error:
            raise MifoError(f"{path} is damaged: step {row['step']}: {error}") from error
        for logger in loggers:
            logger.log_metrics(values, row["step"])


def _send_table(name: str, title: str, table: Path, settings: RunSettings) -> None:
    """Send the table as a run of its own, in which each sending follows the one before."""
    if not has_wandb_key():
        os.environ.setdefault("WANDB_MODE", "offline")
    own = {"save_dir": str(table), "name": title, "group": name, "job_type": "table", "tags": [name]}
    logger = open_logger("wandb", settings.logger["wandb"] | own, table, {"table": name})
    failed = True
    try:
        log_table(logger, name, table)
        failed = False
    finally:
        wandb.finish(exit_code=int(failed))
