"""`mifo table experiments/NAME`: make the runs of a table that are missing, and the table."""

import hashlib
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from mifo.config.compose import key_of
from mifo.config.launch import launcher
from mifo.errors import MifoError
from mifo.tables.asked import of_hydra, wants_own_gpu
from mifo.tables.execute import Done, execute, finished
from mifo.tables.plan import Run, plan
from mifo.tables.record import EVALUATORS, Entry, read_record
from mifo.tables.settings import read_table
from mifo.tables.write import QUESTION, claim_results, write_table


def table(arguments: list[str]) -> int:
    """Run the command; returns how many runs have no result.

    Raises:
        MifoError: the table cannot be read, all its runs are refused, or they cannot be compared.
    """
    given, *others = arguments
    hydra, changes = of_hydra(others)
    folder = Path(given)
    name = folder.resolve().name
    settings, overrides = read_table(folder, changes)
    asking = [text for text in changes if key_of(text) != "table.send"]
    asked = hashlib.sha256(repr(asking).encode()).hexdigest()[:6]
    target = Path(settings.results or f"outputs/tables/{name}-{asked}")
    if settings.workers:
        hydra = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={settings.workers}", *hydra]
    launch = launcher("mifo.tables.execute.make_runs", hydra, target, wants_own_gpu(overrides))
    runs = plan(name, settings, overrides)
    _tell_refusals(runs)
    record = {key: entry for each in settings.records for key, entry in _record(each, runs).items()}
    claim_results(target, settings, overrides)
    pool, any_code = Path(settings.runs), settings.code == "any"
    if settings.missing == "leave":
        ended = finished(runs, pool, any_code, record)
        _keep_all(target, ended)
    else:
        ended = execute(runs, pool, launch, settings.per_job, any_code, record)
    command = shlex.join(["mifo", "table", *arguments])
    Console().print(Markdown(write_table(target, command, settings, ended)))
    print(f"table: {target / 'table.md'}")
    if settings.send:
        import_module("mifo.commands.send").send(name, settings.title, target, ended)
    return sum(not done.is_finished for done in ended)


def _record(folder: str, runs: Sequence[Run]) -> dict[str, Entry]:
    """The runs of an earlier table, of which some must be this one's."""
    record = read_record(Path(folder))
    common = [run for run in runs if run.settings is not None and run.key in record]
    if not common:
        raise MifoError(
            f"none of the {len(record)} runs of table.record={folder} is one of this table's; give the "
            f"overrides that stand in its {QUESTION}, with the version of MIFO that made them"
        )
    print(f"{len(common)} of {len(runs)} runs stand in {folder}")
    return record


def _keep_all(target: Path, ended: Sequence[Done]) -> None:
    """Refuse to replace a record by one of fewer runs."""
    if not (target / EVALUATORS).is_file():  # none yet, or of a version that kept no record
        return
    lost = read_record(target).keys() - {done.run.key for done in ended if done.is_finished}
    if lost:
        named = next((f", such as '{done.run}' ({done.error})" for done in ended if done.run.key in lost), "")
        raise MifoError(
            f"{target} would lose {len(lost)} runs that are not finished here{named}; keep them by "
            f"table.record={target}, or choose another folder by table.results=FOLDER"
        )


def _tell_refusals(runs: Sequence[Run]) -> None:
    """Print why runs are refused, each reason once; if all are refused, so is the table."""
    reasons = Counter(run.error or "" for run in runs if run.settings is None)
    told = [f"{count} of {len(runs)} runs: {reason}" for reason, count in reasons.items()]
    if reasons.total() == len(runs):
        raise MifoError(
            f"every run of the table is refused: {'; '.join(told if len(reasons) > 1 else list(reasons))}"
        )
    for line in told:
        Console(stderr=True, soft_wrap=True).print(f"refused: {line}", style="red", markup=False)
