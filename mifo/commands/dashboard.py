"""`mifo dashboard`: the workspace and the report in which runs are compared on Weights & Biases."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from mifo.commands.setup import has_wandb_key
from mifo.config.location import conf_folder
from mifo.config.schema import DashboardSettings, Origin, RunSettings
from mifo.errors import MifoError, nearest, root_cause
from mifo.files import existing_folder, read_text
from mifo.tables.settings import read_table
from mifo.tables.write import newest_results


def dashboard(settings: DashboardSettings) -> None:
    """Send the workspace and the report; prints where they are.

    Raises:
        MifoError: `group_by` is no setting, the table cannot be read, nobody is logged in, the extra is not
            installed, or the server does not take them.
    """
    given = settings.group_by if isinstance(settings.group_by, list) else [settings.group_by]
    about: dict[str, Any] = {
        "group_by": [logged_key(str(name)) for name in given],
        "title": f"Ablations by {', '.join(map(str, given))}",
    }
    if settings.table:
        about = _about_table(Path(settings.table), settings.results)
    if not has_wandb_key():
        raise MifoError("mifo dashboard needs a login to Weights & Biases; run wandb login first")
    try:
        from mifo.report.dashboard import Comparison, ablation_report, ablation_workspace
    except ImportError as error:
        raise MifoError(
            "mifo dashboard needs the package wandb-workspaces; pip install 'mifo[dashboard]'"
        ) from error
    compared = Comparison(settings.entity, settings.project, **about)
    try:
        for name, made in (
            ("workspace", ablation_workspace(compared)),
            ("report", ablation_report(compared)),
        ):
            made.save()
            print(f"{name}: {made.url}")
    except Exception as error:  # of wandb, of its service and of requests, which share no class
        raise MifoError(
            f"Weights & Biases did not take the dashboard ({root_cause(error)}); check entity, login and "
            "network"
        ) from error


def logged_key(name: str) -> str:
    """Where the logged configuration of a run holds the choice or the setting `name`.

    Raises:
        MifoError: there is no such choice or setting.
    """
    choices = [path.name for path in conf_folder().iterdir() if path.is_dir()]
    if name in choices:
        return f"choices.{name}"
    settings = [each.name for kind in (RunSettings, Origin) for each in fields(kind)]
    if name.split(".")[0] not in settings:
        raise MifoError(
            f"group_by={name} is no choice and no setting of mifo run; "
            f"{nearest(name, [*choices, *settings])}take one such as method or penalty.reward_weight"
        )
    return name


def _about_table(folder: Path, results: str | None) -> dict[str, Any]:
    """What a dashboard shows of a table: its rows, its columns and, once it was written, its results."""
    asked, _ = read_table(folder, [])
    name = folder.resolve().name
    found = existing_folder("results", results, "a finished table") if results else newest_results(name)
    finished = None
    if found is not None:  # its pictures are in the table's own run
        finished = re.sub(r"^!\[.*\n?", "", read_text(found / "table.md"), flags=re.MULTILINE)
    return {
        "title": asked.title,
        "group_by": ["row", "set"],
        "table": name,
        "columns": asked.columns,
        "finished": finished,
    }
