"""What `mifo dashboard` would send, as data."""

import json
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from mifo.metrics.evaluation import METRICS

needs_the_extra = pytest.mark.skipif(find_spec("wandb_workspaces") is None, reason="needs wandb-workspaces")


@needs_the_extra
def test_the_workspace_compares_every_score_by_the_chosen_setting():
    from mifo.report.dashboard import Comparison, ablation_workspace, summary_key

    compared = Comparison("team", "mifo", "Losses", ["penalty.terms.penalty.loss", "seed"])
    sent = ablation_workspace(compared)._to_model().model_dump(by_alias=True)
    assert (sent["entity"], sent["project"]) == ("team", "mifo")
    sections = {
        each["name"]: each["panels"] for each in sent["spec"]["section"]["panelBankConfig"]["sections"]
    }
    bars = [panel["config"] for panel in sections["Scores"]]
    assert [bar["metrics"] for bar in bars] == [[summary_key(metric)] for metric in METRICS]
    assert {bar["groupAgg"] for bar in bars} == {"mean"} and {bar["groupArea"] for bar in bars} == {"stderr"}
    arrows = {bar["chartTitle"].rsplit(" ", 1)[0]: bar["chartTitle"][-1] for bar in bars}
    assert arrows["leakage"] == "↓" and arrows["editability"] == "↑"
    text = json.dumps(sent, default=str)
    assert "semantic/loss/attention" in text and "finetuning/loss/prior" in text and "leakage_matrix" in text
    assert {bar["groupBy"].replace(".value", "") for bar in bars} == {"penalty.terms.penalty.loss"}
    grouped = sent["spec"]["section"]["runSets"][0]["grouping"]
    assert [each["name"].replace(".value", "") for each in grouped] == ["penalty.terms.penalty.loss", "seed"]


@needs_the_extra
def test_the_report_shows_the_same_runs(monkeypatch):
    from wandb_workspaces.reports.v2 import interface

    from mifo.report.dashboard import Comparison, ablation_report, summary_key

    monkeypatch.setattr(interface, "_get_api", MagicMock)
    made = ablation_report(Comparison("team", "mifo", "Methods", ["method"]))
    assert made.title == "MIFO: Methods" and made.project == "mifo"
    grids = [block for block in made.blocks if isinstance(block, interface.PanelGrid)]
    assert all(run.entity == "team" and run.groupby == ["config.method"] for g in grids for run in g.runsets)
    shown = {metric for grid in grids for panel in grid.panels for metric in getattr(panel, "metrics", [])}
    assert {summary_key(metric) for metric in METRICS} <= {str(getattr(each, "name", each)) for each in shown}


def test_it_is_refused_without_a_login(mifo, capsys, monkeypatch):
    monkeypatch.setattr("mifo.commands.dashboard.has_wandb_key", lambda: False)
    assert mifo("dashboard", "entity=team") == 2
    assert "wandb login" in capsys.readouterr().err


def test_a_setting_that_no_run_has_groups_nothing(mifo, capsys, monkeypatch):
    monkeypatch.setattr("mifo.commands.dashboard.has_wandb_key", lambda: False)  # which is asked last
    assert mifo("dashboard", "entity=team", "group_by=methd") == 2
    assert "group_by=methd is no choice and no setting" in capsys.readouterr().err


@pytest.fixture
def compared(monkeypatch):
    """What `mifo dashboard` would compare; nothing is sent."""
    seen = []
    monkeypatch.setattr("mifo.commands.dashboard.has_wandb_key", lambda: True)
    for name in ("workspace", "report"):
        monkeypatch.setattr(
            f"mifo.report.dashboard.ablation_{name}", lambda each: seen.append(each) or MagicMock()
        )
    return seen


@needs_the_extra
def test_runs_are_grouped_by_several_choices_and_settings(mifo, compared):
    assert mifo("dashboard", "entity=team", "group_by=[penalty,layout,learning.semantic.steps,seed]") == 0
    assert compared[0].group_by == ["choices.penalty", "choices.layout", "learning.semantic.steps", "seed"]
    assert compared[0].filters == []


@needs_the_extra
def test_a_table_is_compared_by_its_rows_in_its_columns(tmp_path, monkeypatch):
    from wandb_workspaces.reports.v2 import interface

    written = tmp_path / "outputs" / "tables" / "methods-0a1b2c"
    written.mkdir(parents=True)
    (written / "table.md").write_text(
        "# Comparison\n\n| row | leakage |\n\n![The table as a plot](table.png)\n"
    )
    table = Path(__file__).parents[1] / "experiments" / "methods"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interface, "_get_api", MagicMock)
    from mifo.commands.dashboard import _about_table
    from mifo.report.dashboard import Comparison, ablation_report, ablation_workspace, summary_key

    shown = Comparison("team", "mifo", **_about_table(table, None))
    assert shown.columns[2:4] == ["identification", "leakage"] and "box_adherence" in shown.columns
    sent = json.dumps(ablation_workspace(shown)._to_model().model_dump(by_alias=True), default=str)
    assert '"row.value"' in sent and '"methods"' in sent and f"summary:{summary_key('leakage')}" in sent
    blocks = ablation_report(shown).blocks
    (text,) = [block.text for block in blocks if isinstance(block, interface.MarkdownBlock)]
    assert "| row | leakage |" in text and "![" not in text
    media = [
        panel.media_keys
        for block in blocks
        if isinstance(block, interface.PanelGrid)
        for panel in block.panels
        if hasattr(panel, "media_keys")
    ]
    assert ["table/plot", "table/pages"] in media and ["evaluation/samples"] in media


@needs_the_extra
def test_a_server_that_does_not_answer_is_told_in_one_sentence(mifo, capsys, monkeypatch):
    monkeypatch.setattr("mifo.commands.dashboard.has_wandb_key", lambda: True)

    def refuse(*_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("mifo.report.dashboard.ablation_workspace", refuse)
    assert mifo("dashboard", "entity=team") == 2
    assert "did not take the dashboard (no route to host)" in capsys.readouterr().err
