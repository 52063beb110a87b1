"""The Weights & Biases workspace and report in which ablations are compared, made from code.

Needs the extra `dashboard`; nothing is sent before `save()` is called on what is returned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces
from wandb_workspaces import expr

from mifo.metrics.evaluation import METRICS, arrow, best_of, titled

LOSSES = ("total", "denoising", "attention", "prior")
STAGES = ("semantic", "finetuning")
_WEIGHTS = ("reward_weight", "terms.penalty.weight", "terms.finetuning.weight")


@dataclass(frozen=True)
class Comparison:
    """What a dashboard compares.

    Attributes:
        group_by: keys of the logged configuration whose values are told apart, the first one in bars.
        table: only runs of this table; None: all of the project.
        columns: scores that are shown.
        finished: the finished table as Markdown, which the report begins with.
    """

    entity: str
    project: str
    title: str
    group_by: Sequence[str]
    table: str | None = None
    columns: Sequence[str] = field(default_factory=lambda: [*METRICS])
    finished: str | None = None

    @property
    def filters(self) -> list[expr.FilterExpr]:
        return [expr.Config("table") == self.table] if self.table else []

    @property
    def shown(self) -> list[str]:
        """Columns of the list of runs."""
        scores = [f"summary:{summary_key(metric)}" for metric in self.columns]
        return [f"config:{key}.value" for key in self.group_by] + scores


def ablation_workspace(compared: Comparison) -> workspaces.Workspace:
    """Scores, trade-off, pictures and learning curves of the compared runs, in their groups."""
    return workspaces.Workspace(
        entity=compared.entity,
        project=compared.project,
        name=compared.title,
        sections=[
            workspaces.Section(name="Scores", panels=_scores(compared), is_open=True),
            workspaces.Section(name="Trade-off", panels=[_trade_off()], is_open=True),
            workspaces.Section(name="Pictures", panels=_pictures(), is_open=True),
            workspaces.Section(name="Learning", panels=_learning(compared)),
            workspaces.Section(name="Weights of the losses", panels=_weights()),
        ],
        runset_settings=workspaces.RunsetSettings(
            groupby=[workspaces.Config(key) for key in compared.group_by],
            filters=compared.filters,
            pinned_columns=compared.shown,
        ),
    )


def ablation_report(compared: Comparison) -> reports.Report:
    """The same scores and pictures as a page to hand on, after the finished table where there is one."""
    runs = reports.Runset(
        entity=compared.entity,
        project=compared.project,
        groupby=[f"config.{key}" for key in compared.group_by],
        filters=compared.filters,
        pinned_columns=compared.shown,
    )
    directions = ", ".join(f"{name} {arrow(name)}" for name in compared.columns)
    finished: list[reports.Block] = []
    if compared.finished:
        table_run = reports.Runset(
            entity=compared.entity,
            project=compared.project,
            filters=[*compared.filters, expr.Metric("JobType") == "table"],
        )
        drawn = [
            reports.MediaBrowser(media_keys=["table/plot", "table/pages"], num_columns=1),
            reports.WeavePanelSummaryTable(table_name="table/estimates"),
        ]
        finished = [
            reports.MarkdownBlock(text=compared.finished),
            reports.PanelGrid(runsets=[table_run], panels=drawn),
        ]
    return reports.Report(
        entity=compared.entity,
        project=compared.project,
        title=f"MIFO: {compared.title}",
        description="Written by `mifo dashboard`.",
        blocks=[
            *finished,
            reports.H1("Scores"),
            reports.P(f"Means over the runs of a group, with their standard errors. {directions}."),
            reports.PanelGrid(runsets=[runs], panels=[*_scores(compared), _trade_off()]),
            reports.H1("Pictures"),
            reports.PanelGrid(runsets=[runs], panels=_pictures()),
            reports.H1("Learning"),
            reports.PanelGrid(runsets=[runs], panels=_learning(compared)),
        ],
        width="fluid",
    )


def summary_key(metric: str) -> str:
    """Where a run's summary holds a score: `define_metric` keeps the best one under its direction."""
    return f"evaluation/{metric}.{best_of(metric)}"


def _scores(compared: Comparison) -> list[reports.BarPlot]:
    return [
        reports.BarPlot(
            title=titled(metric),
            metrics=[summary_key(metric)],
            groupby=reports.Config(compared.group_by[0]),
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
        )
        for metric in compared.columns
    ]


def _trade_off() -> reports.ScatterPlot:
    return reports.ScatterPlot(
        title="editability against instance-consistency",
        x=reports.SummaryMetric(summary_key("editability")),
        y=reports.SummaryMetric(summary_key("instance_consistency")),
    )


def _pictures() -> list[reports.WeavePanelSummaryTable | reports.MediaBrowser]:
    """The pictures run by run, each with its scores, the heat maps, and what `callbacks=full` draws."""
    drawn = ("samples", "attention_maps", "leakage")
    keys = ["evaluation/leakage_matrix", *(f"{stage}/{name}" for stage in STAGES for name in drawn)]
    return [
        reports.MediaBrowser(
            title="pictures by run", media_keys=["evaluation/samples"], grid_x_axis="step", grid_y_axis="run"
        ),
        reports.WeavePanelSummaryTable(table_name="evaluation/pictures"),
        *(reports.MediaBrowser(media_keys=[key], num_columns=4) for key in keys),
    ]


def _learning(compared: Comparison) -> list[reports.LinePlot]:
    return [
        reports.LinePlot(
            title=f"{stage}: {loss}",
            x="trainer/global_step",
            y=[f"{stage}/loss/{loss}"],
            groupby=reports.Config(compared.group_by[0]),
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
            smoothing_factor=0.6,
        )
        for stage in STAGES
        for loss in LOSSES
    ]


def _weights() -> list[reports.ParallelCoordinatesPlot | reports.ParameterImportancePlot]:
    columns = [
        *(reports.Config(f"penalty.{term}") for term in _WEIGHTS),
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
