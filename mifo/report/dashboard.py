"""The Weights & Biases workspace and report in which ablations are compared, made from code.

Needs the extra `dashboard`; nothing is sent before `save()` is called on what is returned.
"""

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces

from mifo.metrics.evaluation import METRICS, best_of

LOSSES = ("total", "denoising", "attention", "prior")
STAGES = ("semantic", "finetuning")


def ablation_workspace(entity: str, project: str, group_by: str) -> workspaces.Workspace:
    """Scores, trade-off, learning curves and pictures of all runs, grouped by the setting `group_by`."""
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=f"Ablations by {group_by}",
        sections=[
            workspaces.Section(name="Scores", panels=_scores(group_by), is_open=True),
            workspaces.Section(name="Trade-off", panels=[_trade_off()], is_open=True),
            workspaces.Section(name="Pictures", panels=_pictures(), is_open=True),
            workspaces.Section(name="Learning", panels=_learning(group_by)),
            workspaces.Section(name="Weights of the losses", panels=_weights()),
        ],
        runset_settings=workspaces.RunsetSettings(groupby=[workspaces.Config(group_by)]),
    )


def ablation_report(entity: str, project: str, group_by: str) -> reports.Report:
    """The same scores and pictures as a page to hand on."""
    runs = reports.Runset(entity=entity, project=project, groupby=[f"config.{group_by}"])
    directions = ", ".join(
        f"{name} {'↑' if kind.higher_is_better else '↓'}" for name, kind in METRICS.items()
    )
    return reports.Report(
        entity=entity,
        project=project,
        title=f"MIFO: ablations by {group_by}",
        description="Written by `mifo dashboard`.",
        blocks=[
            reports.H1("Scores"),
            reports.P(f"Means over the runs of a group, with their standard errors. {directions}."),
            reports.PanelGrid(runsets=[runs], panels=[*_scores(group_by), _trade_off()]),
            reports.H1("Pictures"),
            reports.PanelGrid(runsets=[runs], panels=_pictures()),
            reports.H1("Learning"),
            reports.PanelGrid(runsets=[runs], panels=_learning(group_by)),
        ],
        width="fluid",
    )


def summary_key(metric: str) -> str:
    """Where a run's summary holds a score: `define_metric` keeps the best one under its direction."""
    return f"evaluation/{metric}.{best_of(metric)}"


def _scores(group_by: str) -> list[reports.BarPlot]:
    return [
        reports.BarPlot(
            title=f"{metric.replace('_', ' ')} {'↑' if kind.higher_is_better else '↓'}",
            metrics=[summary_key(metric)],
            groupby=reports.Config(group_by),
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
        )
        for metric, kind in METRICS.items()
    ]


def _trade_off() -> reports.ScatterPlot:
    return reports.ScatterPlot(
        title="editability against instance-consistency",
        x=reports.SummaryMetric(summary_key("editability")),
        y=reports.SummaryMetric(summary_key("instance_consistency")),
    )


def _pictures() -> list[reports.WeavePanelSummaryTable | reports.MediaBrowser]:
    """Every picture with its scores, the heat maps, and what `callbacks=full` draws while learning."""
    drawn = ("samples", "attention_maps", "leakage")
    keys = ["evaluation/leakage_matrix", *(f"{stage}/{name}" for stage in STAGES for name in drawn)]
    return [
        reports.WeavePanelSummaryTable(table_name="evaluation/pictures"),
        *(reports.MediaBrowser(media_keys=[key], num_columns=4) for key in keys),
    ]


def _learning(group_by: str) -> list[reports.LinePlot]:
    return [
        reports.LinePlot(
            title=f"{stage}: {loss}",
            x="trainer/global_step",
            y=[f"{stage}/loss/{loss}"],
            groupby=reports.Config(group_by),
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
            smoothing_factor=0.6,
        )
        for stage in STAGES
        for loss in LOSSES
    ]


def _weights() -> list[reports.ParallelCoordinatesPlot | reports.ParameterImportancePlot]:
    columns = [
        *(reports.Config(f"penalty.{term}.weight") for term in ("warmup", "semantic", "finetuning")),
        *(
            reports.SummaryMetric(summary_key(name))
            for name in ("editability", "instance_consistency", "leakage")
        ),
    ]
    return [
        reports.ParallelCoordinatesPlot(
            columns=[reports.ParallelCoordinatesPlotColumn(metric=column) for column in columns]
        ),
        reports.ParameterImportancePlot(with_respect_to=summary_key("leakage")),
    ]
