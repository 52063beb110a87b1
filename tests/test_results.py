"""`mifo results`: runs on disk, found by their settings and scores."""

import csv
import io
import json
import os
import shutil
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from mifo.commands.results import results
from mifo.errors import MifoError
from mifo.metrics.evaluation import METRICS
from mifo.metrics.scores import RANGES, Evaluation, Evaluator, Score

SETTINGS = {
    "task": "run",
    "method": "mifo",
    "instances": {"name": "three_cars", "class_names": ["car", "car"]},
    "penalty": {"terms": {"penalty": {"weight": 0.02}}},
    "paths": {"output": "x"},
    "sheet": True,
}


def make(folder, number, status="ok", **scores):
    """A folder of a run: its seed and weight follow from its number."""
    folder.mkdir(parents=True)
    settings = {
        **SETTINGS,
        "seed": number,
        "penalty": {"terms": {"penalty": {"weight": number / 1000}}},
        "origin": {"choices": {"penalty": "none" if number % 2 else "mifo"}, "row": None, "code": "abc"},
    }
    (folder / "config.yaml").write_text(yaml.dump(settings))
    (folder / "status.json").write_text(json.dumps({"status": status, "error": None, "overrides": []}))
    if scores:
        write_scores(folder, scores)
    (folder / "learned").mkdir()


def write_scores(folder, scores):
    """As `Evaluation.save`, but whatever the values are."""
    judge = Evaluator("judge", "0" * 12)
    listed = tuple(Score(name, value, True, judge, "tiny") for name, value in scores.items())
    (folder / "scores.json").write_text(json.dumps(asdict(Evaluation(listed, ()))))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """300 runs of two sweeps, one alone, one that failed, and a link to one of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(300):
        folder = tmp_path / "multirun" / "run" / f"sweep{number % 2}" / str(number)
        make(folder, number, leakage=(number * 7 % 300) / 300, editability=number / 300)
    make(tmp_path / "outputs" / "run" / "alone", 1000, "failed")
    (tmp_path / "multirun" / "run" / "sweep1" / "linked").symlink_to(tmp_path / "outputs" / "run" / "alone")
    return tmp_path


@pytest.fixture
def listed(runs, capsys):
    """`listed(argument, …)` gives the rows of the CSV."""

    def ask(*arguments):
        capsys.readouterr()
        results([*arguments, "format=csv"])
        return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))

    return ask


def test_runs_are_filtered_by_any_setting_and_sorted_by_any_score(listed):
    assert len(listed()) == 301
    weight = "penalty.terms.penalty.weight"
    found = listed(
        "choices.penalty=none", f"{weight}>0.29", "sort=leakage", f"columns=[seed,leakage,{weight}]"
    )
    assert {int(row["seed"]) for row in found} == {291, 293, 295, 297, 299, 1000} - {1000}
    assert [float(row["leakage"]) for row in found] == sorted(float(row["leakage"]) for row in found)
    assert [row["seed"] for row in listed("sort=-editability", "seed<3", "columns=seed")] == ["2", "1", "0"]
    assert [row["seed"] for row in listed("seed=5,7", "columns=seed")] == ["5", "7"]
    assert len(listed("seed!=5,7")) == 299 and len(listed("status!=ok")) == 1
    assert [row["folder"] for row in listed("status=failed")] == ["outputs/run/alone"]
    assert len(listed("sheet=true")) == 301 and listed("sheet=false") == []
    assert len(listed("multirun/run/sweep0")) == 150
    assert listed("method=mifo", "sort=leakage")[-1]["seed"] == "1000"  # without the score: at the end
    assert listed("limit=3", "sort=") == listed("limit=3")


@pytest.mark.parametrize("sign", ["=", "=="])
def test_a_fraction_is_found_by_the_digits_that_a_list_shows(listed, sign):
    assert [row["seed"] for row in listed(f"leakage{sign}0.3333", "columns=seed")] == ["100"]
    assert len(listed("leakage!=0.3333")) == 300 and listed(f"leakage{sign}0.333") == []
    assert [row["seed"] for row in listed(f"leakage{sign}0", "columns=seed")] == ["0"]
    assert listed(f"leakage{sign}") == []
    assert "100" in [row["seed"] for row in listed("leakage<=0.3333", "columns=seed")]
    assert len(listed(f"limit{sign}3")) == 3


def test_a_label_with_a_comma_is_one_value(runs, listed):
    for number, row in enumerate(("MIFO", "MIFO, kept on", "none")):
        make(runs / "tables" / str(number), number)
        file = runs / "tables" / str(number) / "config.yaml"
        file.write_text(file.read_text().replace("row: null", f"row: {row}"))
    found = {
        asked: [run["seed"] for run in listed("tables", asked, "columns=seed")]
        for asked in ("row=MIFO, kept on", "row!=MIFO, kept on", "row=MIFO,none")
    }
    assert [*found.values()] == [["1"], ["0", "2"], ["0", "2"]]


def test_a_bomb_of_aliases_is_not_unfolded(runs, listed):
    folder = runs / "outputs" / "run" / "bomb"
    make(folder, 9000)
    names = "abcdefghijk"
    lines = [f"{one}: &{one} [{', '.join([f'*{before}'] * 9)}]" for before, one in pairwise(names)]
    (folder / "config.yaml").write_text("\n".join(["a: &a [x]", *lines]))
    assert [row["error"] for row in listed("status=damaged", "columns=error")] == ["config.yaml is damaged"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "text"),
        ("config.yaml", ""),
        ("config.yaml", "[1, 2]"),
        ("config.yaml", "origin: 5"),
        ("config.yaml", 'group: "\\ud800"'),
        ("config.yaml", "!!python/object/apply:os.system [touch owned]"),
        ("status.json", "[]"),
        ("status.json", '{"status": {"a": [1]}}'),
        ("status.json", '{"status": "\\ud800"}'),
        ("scores.json", '{"scores": {"a": 1}, "pictures": 5}'),
    ],
)
def test_what_is_no_record_of_a_run_stops_no_list(runs, listed, name, content):
    make(runs / "outputs" / "run" / "odd", 9000, leakage=0.5)
    (runs / "outputs" / "run" / "odd" / name).write_text(content)
    assert len(listed()) == 302


def test_a_folder_whose_name_is_no_text_is_left_out_and_named(runs, listed, caplog):
    make(Path(os.fsdecode(b"outputs/run/bad\xff")), 9000, leakage=0.5)
    assert len(listed()) == 301
    assert "bad\\udcff' is left out, since its name is no text" in caplog.text


def test_texts_of_a_csv_are_nothing_to_compute(runs, listed):
    folder = runs / "outputs" / "run" / "odd"
    make(folder, 8000)
    settings = yaml.safe_load((folder / "config.yaml").read_text()) | {"group": "=cmd|'/c calc'!A1"}
    (folder / "config.yaml").write_text(yaml.dump(settings))
    assert [row["group"] for row in listed("seed=8000", "columns=group")] == ["'=cmd|'/c calc'!A1"]


def test_json_and_tables_say_the_same(runs, listed, capsys):
    results(["seed<3", "columns=[seed,leakage]", "format=json"])
    told = json.loads(capsys.readouterr().out)
    assert [str(run["seed"]) for run in told] == [row["seed"] for row in listed("seed<3")]
    results(["limit=2", "columns=[seed]"])
    assert "2 of 301 runs; limit=0 shows all" in capsys.readouterr().out


def test_what_changes_is_read_again_and_what_goes_is_forgotten(runs, listed):
    folder = runs / "multirun" / "run" / "sweep0" / "0"
    assert len(listed("seed=0")) == 1
    shutil.rmtree(folder)
    assert listed("seed=0") == []
    make(folder, 500, leakage=0.5)
    assert [row["leakage"] for row in listed("seed=500")] == ["0.5"]
    (folder / "config.yaml").write_text("{")
    (folder / "status.json").write_text(json.dumps({"status": "failed", "error": None, "overrides": []}))
    assert [row["error"] for row in listed("status=damaged", "columns=error")] == ["config.yaml is damaged"]


def test_a_run_that_begins_is_read_again_when_its_settings_are_there(runs, listed):
    folder = runs / "outputs" / "run" / "begun"
    make(folder, 8000)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").unlink()
    assert listed("seed=8000") == []
    (folder / "config.yaml").write_text(config)
    assert len(listed("seed=8000")) == 1


def test_runs_of_other_folders_say_nothing(runs, listed, capsys):
    assert len(listed("seed=0")) == 1
    make(runs / "elsewhere" / "run", 1)
    results([str(runs / "elsewhere"), "format=csv"])
    assert "leakage" not in capsys.readouterr().out
    with pytest.raises(MifoError, match="no run has the key leakage"):
        results([str(runs / "elsewhere"), "sort=leakage"])
    (runs / "empty").mkdir()
    with pytest.raises(MifoError, match="there are no runs in these folders"):
        results([str(runs / "empty"), "seed=0"])


def test_every_metric_has_a_range():
    assert [*METRICS] == [*RANGES]


@pytest.mark.parametrize(
    "damage",
    [
        {"leakage": 7.0},
        {"leakage": -0.2},
        {"editability": -1.5},
        {"leakage": float("nan")},
        {"leakage": float("inf")},
        {"leakage": "0.5"},
        {"status": 0.5},
        "another digit",
        "twice",
        "torn",
    ],
)
def test_a_damaged_score_is_told_and_is_no_figure(runs, listed, capsys, damage):
    folder = runs / "multirun" / "run" / "damaged"
    make(folder, 6000)
    file = folder / "scores.json"
    if isinstance(damage, dict):
        write_scores(folder, damage)
    else:
        judge = Evaluator("judge", "0" * 12)
        Evaluation((Score("leakage", 0.25, False, judge, "tiny"),), ()).save(file)
        text = file.read_text()
        if damage == "another digit":
            text = text.replace("0.25", "0.75")
        elif damage == "twice":
            content = json.loads(text)
            first = {**content["scores"][0], "value": 7.0}
            text = json.dumps({"scores": [first, *content["scores"]], "pictures": []})
        file.write_text(text[:-9] if damage == "torn" else text)
    (row,) = listed("seed=6000", "columns=[status,error,leakage,editability]")
    told = [row[key] for key in ("status", "error", "leakage", "editability")]
    assert told == ["damaged", "scores.json is damaged", "", ""]
    results(["diff", str(folder), "multirun/run/sweep0/0"])
    assert "scores.json is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["deleted", "torn", "of another version", "read-only"])
def test_the_index_can_always_be_made_again(runs, listed, damage):
    before = listed("seed<9")
    path = runs / "cache" / "mifo" / "results.sqlite"
    if damage == "deleted":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:3000] + b"x" * 3000)
    elif damage == "of another version":
        import sqlite3

        sqlite3.connect(path).execute("PRAGMA user_version = 99")
    else:
        shutil.rmtree(runs / "cache")
        (runs / "cache").write_text("no folder")
    assert listed("seed<9") == before


def test_a_run_that_died_is_not_called_running(runs, listed):
    status = {"status": "running", "error": None, "overrides": [], "pid": 2**22 + 1}
    import socket

    make(runs / "outputs" / "run" / "dead", 7000)
    (runs / "outputs" / "run" / "dead" / "status.json").write_text(
        json.dumps(status | {"host": socket.gethostname()})
    )
    assert [row["status"] for row in listed("seed=7000", "columns=status")] == ["died"]
    assert len(listed("status=died")) == 1


def test_two_runs_differ_in_what_is_named_and_a_sheet_is_opened(runs, capsys, monkeypatch):
    results(["diff", "multirun/run/sweep0/2", "multirun/run/sweep1/3"])
    told = capsys.readouterr().out
    assert "choices.penalty" in told and "seed" in told and "leakage" in told and "instances.name" not in told
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    (runs / "outputs" / "run" / "alone" / "contact_sheet.html").write_text("")
    results(["show", "outputs/run/alone"])
    assert opened == [(runs / "outputs" / "run" / "alone" / "contact_sheet.html").as_uri()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["weight>0.1"], "did you mean penalty.terms.penalty.weight?"),
        (["sort=leakag"], "did you mean leakage?"),
        (["nosuch"], "nosuch is no folder and no filter"),
        (["x" * 300], "is no folder and no filter"),
        (["weight=" + "x" * 300], "did you mean penalty.terms.penalty.weight?"),
        (["leakage>much"], "leakage>much compares with no number"),
        (["format=xml"], "take one of table, csv, json"),
        (["limit=-1"], "limit=-1 is no number of runs"),
        (["diff", "one"], "diff takes two folders"),
        (["show", "multirun"], "multirun holds no run"),
    ],
)
def test_refusals_name_what_is_wrong(mifo, capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make(tmp_path / "multirun" / "run" / "0", 1, leakage=0.5)
    assert mifo("results", *arguments) == 2
    assert words in capsys.readouterr().err
