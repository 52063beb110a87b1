"""What a table asks: `table.yaml` in a folder of `experiments/`."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from unicodedata import category

from omegaconf import MISSING

from mifo.config.checks import check_seed
from mifo.config.compose import key_of
from mifo.errors import MifoError, check_known
from mifo.metrics.scores import RANGES
from mifo.tables.asked import check_fixed, check_only, read_asked

FILE = "table.yaml"
LABELLED = ("rows", "grid", "scenes")  # their keys are the user's
_COLUMNS = ("editability", "instance_consistency", "identification", "leakage", "class_accuracy")
PLOTS = ("dots", "lines", "pareto")
PARETO = ("editability", "instance_consistency")  # across and up


@dataclass
class TableSettings:
    """A table: every row is run on every scene with every seed by `mifo run`.

    `rows` and `scenes` are the two ways in which runs differ; what they share stands in `overrides`. All
    overrides are those of `mifo run`, so that a row is a line one could type.
    """

    title: str = MISSING
    rows: dict[str, list[str]] = field(default_factory=dict)  # label → overrides
    only: list[str] = field(default_factory=list)  # labels of the rows that are asked, * is any text; []: all
    # key → values; every combination is one more row
    grid: dict[str, list[Any]] = field(default_factory=dict)
    # set → names in conf/instances, * for any text
    scenes: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    overrides: list[str] = field(default_factory=list)  # of every run
    columns: list[str] = field(default_factory=lambda: [*_COLUMNS])
    plot: str = "dots"  # dots | lines (over the sets of scenes) | pareto (editability against consistency)
    pages: list[str] | None = None  # scenes of which a page of pictures may be drawn; None: any
    workers: int = 0  # short for hydra/launcher=joblib hydra.launcher.n_jobs=N; 0: another launcher, or none
    per_job: int = 1  # so many groups of runs that learn the same go to one job of a launcher
    code: str = "current"  # current: runs of other code are made again; any: they count
    missing: str = "run"  # run: make what is missing; leave: the table of what is finished
    runs: str = "outputs/runs"  # all tables share their runs
    record: Any = None  # the results of an earlier table or of several, whose runs count as they are
    send: bool = False  # tell Weights & Biases of finished runs that it was not told of, and of the table
    results: str | None = None  # where the table goes; None: outputs/tables/NAME-…

    @property
    def records(self) -> list[Any]:
        """`record` as a list of folders."""
        return self.record if isinstance(self.record, list) else [self.record] if self.record else []


HELP = f"""usage: mifo table FOLDER [table.KEY=VALUE ...] [override of every run ...]

  mifo table experiments/methods                                   on the embedded miniature
  mifo table experiments/methods model=sd21 trainer=gpu            the same on Stable Diffusion 2.1
  mifo table experiments/methods debug=default 'table.seeds=[0]'   a few steps of everything
  mifo table experiments/methods table.workers=8                   eight processes (extra joblib)
  mifo table experiments/methods hydra/launcher=gpus hydra.launcher.n_jobs=2    each alone on a GPU
  mifo table experiments/methods hydra/launcher=submitit_slurm hydra.launcher.partition=NAME table.per_job=9
  mifo table experiments/methods table.missing=leave               the table of what is finished so far
  mifo table experiments/methods 'table.only=[MIFO, "*Scene"]'     a part of the rows
  mifo table experiments/methods logger=wandb                      its runs appear there, with row and set
  mifo table experiments/methods table.send=true table.missing=leave    so do finished ones, once
  mifo table experiments/methods table.record=FOLDER ...           with the runs of an earlier table's results
  mifo table experiments/methods 'table.record=[ONE, OTHER]' ...   of several: parts that other machines made

FOLDER/table.yaml says what is asked; table.KEY=VALUE changes one of its keys, which are
{", ".join(field.name for field in fields(TableSettings))}.
Without a launcher of Hydra the runs are made in this process, one after the other.
Rows, scenes and seeds are changed there alone: an override of what they set is refused.
Run it again after an interruption: what is done is not done again, what failed is tried again."""


def read_table(folder: Path, arguments: list[str]) -> tuple[TableSettings, list[str]]:
    """Read `folder/table.yaml` with the command line on top of it.

    Args:
        folder: a folder of `experiments/`.
        arguments: `table.KEY=VALUE` changes the table; everything else is an override of every run, of a key
            that tells no rows, scenes or seeds apart.

    Returns:
        The table's settings, and the overrides of every run in the order in which they win.

    Raises:
        MifoError: no such table, an unknown key, a value that it does not take, or an override of every run
            under which rows, scenes or seeds would not be what the table calls them.
    """
    settings, changed, others = read_asked(
        folder, "table", "experiments/methods", TableSettings, arguments, LABELLED
    )
    _check(settings, folder / FILE)
    # those of the file are its author's, who named the rows too
    _check_labels(settings, [*(settings.overrides if "overrides" in changed else []), *others])
    return settings, [*settings.overrides, *others]


def _check(settings: TableSettings, file: Path) -> None:
    if not all(isinstance(each, str) for each in settings.records):
        raise MifoError(f"{file}: table.record={settings.record} must be a folder of results, or several")
    if not (settings.rows or settings.grid) or not settings.scenes or not settings.seeds:
        raise MifoError(f"{file}: a table needs rows or a grid, scenes and seeds")
    for label in (settings.title, *settings.rows, *settings.grid, *settings.scenes):
        if not label.strip() or any(category(letter).startswith(("Cc", "Zl", "Zp")) for letter in label):
            raise MifoError(f"{file}: the title and every label must be one line of text, unlike {label!r}")
    check_only("table.only", settings.only, settings.rows)
    for seed in settings.seeds:
        check_seed("table.seeds", seed)
    if settings.workers < 0 or settings.per_job < 1:
        raise MifoError("table.workers must be at least 0, table.per_job at least 1")
    for key, value, known in (
        ("plot", settings.plot, PLOTS),
        ("code", settings.code, ("current", "any")),
        ("missing", settings.missing, ("run", "leave")),
        *(("columns", column, RANGES) for column in settings.columns),
    ):
        check_known(f"table.{key}", value, known)
    if settings.plot == "pareto" and (lacking := {*PARETO} - {*settings.columns}):
        raise MifoError(f"table.plot=pareto is of two scores; add {min(lacking)} to table.columns")


def _check_labels(settings: TableSettings, overrides: list[str]) -> None:
    """Refuse `overrides` of every run that would replace what rows, scenes or seeds are named by."""
    fixed = {key_of(delta): f"row '{label}'" for label, deltas in settings.rows.items() for delta in deltas}
    fixed |= {key_of(key): "grid" for key in settings.grid} | {"instances": "scenes", "seed": "seeds"}

    def instead(place: str, override: str) -> str:
        key, value = key_of(override), override.partition("=")[2]
        return {
            "scenes": f"table.scenes={{{value}: [{value}]}}",
            "seeds": f"table.seeds=[{value}]",
            "grid": f"table.grid={{{key}: [{value}]}}",
        }.get(place, f"table.rows={{LABEL: [{override}]}}")

    check_fixed("table", fixed, overrides, instead)
