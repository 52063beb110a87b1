"""What `mifo dashboard` would send, as data."""

import json
from importlib.util import find_spec
from unittest.mock import MagicMock

import pytest

from mifo.metrics.evaluation import METRICS

needs_the_extra = pytest.mark.skipif(find_spec("wandb_workspaces") is None, reason="needs wandb-workspaces")


@needs_the_extra
def test_the_workspace_compares_every_score_by_the_chosen_setting():
    from mifo.report.dashboard import ablation_workspace, summary_key

    sent = (
        ablation_workspace("team", "mifo", "penalty.terms.penalty.loss")._to_model().model_dump(by_alias=True)
    )
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


@needs_the_extra
def test_the_report_shows_the_same_runs(monkeypatch):
    from wandb_workspaces.reports.v2 import interface

    from mifo.report.dashboard import ablation_report, summary_key

    monkeypatch.setattr(interface, "_get_api", MagicMock)
    made = ablation_report("team", "mifo", "method")
    assert made.title == "MIFO: ablations by method" and made.project == "mifo"
    grids = [block for block in made.blocks if isinstance(block, interface.PanelGrid)]
    assert all(run.entity == "team" and run.groupby == ["config.method"] for g in grids for run in g.runsets)
    shown = {metric for grid in grids for panel in grid.panels for metric in getattr(panel, "metrics", [])}
    assert {summary_key(metric) for metric in METRICS} <= {str(getattr(each, "name", each)) for each in shown}


def test_it_is_refused_without_a_login(mifo, capsys, monkeypatch):
    monkeypatch.setattr("mifo.commands.dashboard.has_wandb_key", lambda: False)
    assert mifo("dashboard", "entity=team") == 2
    assert "wandb login" in capsys.readouterr().err


def test_a_setting_that_no_run_has_groups_nothing(mifo, capsys, monkeypatch):
    monkeypatch.setattr("mifo.commands.dashboard.has_wandb_key", lambda: True)
    assert mifo("dashboard", "entity=team", "group_by=methd") == 2
    assert "group_by=methd is no setting" in capsys.readouterr().err


@needs_the_extra
def test_a_server_that_does_not_answer_is_told_in_one_sentence(mifo, capsys, monkeypatch):
    monkeypatch.setattr("mifo.commands.dashboard.has_wandb_key", lambda: True)

    def refuse(*_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("mifo.report.dashboard.ablation_workspace", refuse)
    assert mifo("dashboard", "entity=team") == 2
    assert "did not take the dashboard (no route to host)" in capsys.readouterr().err
