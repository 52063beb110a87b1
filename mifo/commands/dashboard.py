"""`mifo dashboard`: the workspace and the report in which ablations are compared on Weights & Biases."""

from dataclasses import fields

import wandb

from mifo.commands.setup import has_wandb_key
from mifo.config.compose import reason
from mifo.config.schema import DashboardSettings, RunSettings
from mifo.errors import MifoError


def dashboard(settings: DashboardSettings) -> None:
    """Send the workspace and the report; prints where they are.

    Raises:
        MifoError: nobody is logged in, `group_by` is no setting, the extra is not installed, or the server
            does not take them.
    """
    if not has_wandb_key():
        raise MifoError("mifo dashboard needs a login to Weights & Biases; run wandb login first")
    if settings.group_by.split(".")[0] not in {field.name for field in fields(RunSettings)}:
        raise MifoError(
            f"group_by={settings.group_by} is no setting of mifo run; take one such as method or "
            "penalty.semantic.weight"
        )
    try:
        from mifo.report.dashboard import ablation_report, ablation_workspace
    except ImportError as error:
        raise MifoError(
            "mifo dashboard needs the package wandb-workspaces; pip install 'mifo[dashboard]'"
        ) from error
    place = (settings.entity, settings.project, settings.group_by)
    try:
        for name, made in (("workspace", ablation_workspace(*place)), ("report", ablation_report(*place))):
            made.save()
            print(f"{name}: {made.url}")
    except (wandb.errors.Error, OSError) as error:  # those of requests are of the latter kind
        raise MifoError(
            f"Weights & Biases did not take the dashboard ({reason(error)}); check entity, login and network"
        ) from error
