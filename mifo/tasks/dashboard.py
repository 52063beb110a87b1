"""`mifo dashboard`: the workspace and the report in which ablations are compared on Weights & Biases."""

from mifo.config.schema import DashboardSettings
from mifo.errors import MifoError
from mifo.tasks.setup import has_wandb_key


def dashboard(settings: DashboardSettings) -> None:
    """Send the workspace and the report; prints where they are.

    Raises:
        MifoError: the extra is not installed, or nobody is logged in.
    """
    try:
        from mifo.report.dashboard import ablation_report, ablation_workspace
    except ImportError as error:
        raise MifoError(
            "mifo dashboard needs the package wandb-workspaces; pip install 'mifo[dashboard]'"
        ) from error
    if not has_wandb_key():
        raise MifoError("mifo dashboard needs a login to Weights & Biases; run wandb login first")
    place = (settings.entity, settings.project, settings.group_by)
    for name, made in (("workspace", ablation_workspace(*place)), ("report", ablation_report(*place))):
        made.save()
        print(f"{name}: {made.url}")
