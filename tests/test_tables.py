"""Tables: what is run, what is not run again, and what the runs say together."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import wandb
from matplotlib.figure import Figure
from matplotlib.text import Text
from offline_wandb import read_offline_run
from PIL import Image
from scipy import stats
from tiny import tiny_pipeline

from mifo.commands.send import log_curves
from mifo.commands.table import table
from mifo.config import identity
from mifo.config.compose import compose, settings_of
from mifo.config.identity import CodeVersion
from mifo.data.saved_pictures import Picture, save_pictures
from mifo.errors import MifoError
from mifo.metrics.scores import Evaluation, Evaluator, Score, has_scores
from mifo.report.comparison import SIDE
from mifo.report.content import LABELS
from mifo.tables import execute, plan
from mifo.tables.collect import (
    Estimate,
    Measured,
    cells,
    differences,
    estimate,
    estimate_runs,
    pareto_front,
)
from mifo.tables.plan import Run
from mifo.tables.plot import draw_table
from mifo.tables.record import About, Entry, read_record, write_record
from mifo.tables.settings import PARETO, TableSettings, read_table
from mifo.tables.write import _best, claim_results, newest_results, write_table

ROOT = Path(__file__).parents[1]
RECORDS = sorted(path.with_name("runs.csv") for path in (ROOT / "experiments").glob("*/*/question.json"))
TABLES = sorted(path.parent for path in (ROOT / "experiments").glob("*/table.yaml"))

SMALL = """
# A small table
title: Small
rows:
  MIFO: [method=mifo]
  none: [method=no_attention_loss]
scenes:
  cars: [three_cars]
seeds: [0, 1]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with a table of two rows and two seeds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "table.yaml").write_text(SMALL)
    return tmp_path


@pytest.fixture
def made(monkeypatch):
    """Runs that take no time: their scores follow from their settings; the list of what was made."""
    seen = []

    def run(settings):
        seen.append((settings.method, settings.seed))
        folder = Path(settings.paths.output)
        if not (folder / "learned").exists():
            (folder / "learned").mkdir()
            (folder / "learned" / "tokens").write_text(settings.method)
            seen[-1] += ("learned",)
        value = settings.seed / 10 + (settings.method == "mifo") / 2
        evaluator = Evaluator("colour", "0" * 12)
        scores = [Score(m, value, m != "leakage", evaluator, "test") for m in ("editability", "leakage")]
        if not has_scores(folder / "scores.json"):
            Evaluation(tuple(scores), ()).save(folder / "scores.json")

    monkeypatch.setattr(execute, "perform", run)
    return seen


def results(folder):
    (found,) = (folder / "outputs" / "tables").iterdir()
    return found


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
@pytest.mark.parametrize("model", ["miniature", "sd21"])
def test_every_row_of_every_table_composes(path, model):
    settings, overrides = read_table(path, [f"model={model}", "table.seeds=[0]"])
    settings.scenes = {name: options[:1] for name, options in list(settings.scenes.items())[:1]}
    runs = plan.plan(path.name, settings, overrides)
    assert runs and not [run.error for run in runs if run.error]
    assert len({run.key for run in runs}) == len({(run.row, run.instances) for run in runs})
    assert (path / "README.md").is_file()


def test_a_part_of_the_rows_is_asked_by_their_labels(folder, made):
    asking = ["small", "table.results=part"]
    table([*asking, "table.only=[n*]"])
    assert {seen[0] for seen in made} == {"no_attention_loss"}
    # the whole table goes on from the record of a part
    shutil.rmtree("outputs/runs")
    made.clear()
    table(["small", "table.results=whole", "table.record=part"])
    assert {seen[0] for seen in made} == {"mifo"}
    with pytest.raises(MifoError, match="none is called Mifo; take some of MIFO, none"):
        table([*asking, "table.only=[Mifo]"])


def test_a_scene_may_stand_in_several_sets_and_is_run_once(folder, made):
    both = "['alike-2-*-same-*', 'alike-2-hue0-same-*']"
    table(["small", f"table.scenes={{all: {both}, one hue: ['alike-2-hue0-same-*']}}"])
    assert len(made) == 3 * 2 * 2
    with open(results(folder) / "table.csv") as file:
        numbers = {(row["row"], row["scenes"]): row["runs"] for row in csv.DictReader(file)}
    assert numbers["MIFO", "all"] == "6" and numbers["MIFO", "one hue"] == "2"


def test_rows_that_differ_after_learning_alone_learn_the_same():
    settings, overrides = read_table(ROOT / "experiments" / "synthesis_ablation", ["table.seeds=[0]"])
    settings.scenes = {"one": ["three_cars"]}
    runs = plan.plan("synthesis_ablation", settings, overrides)
    assert len({run.key for run in runs}) == 4 and len({run.learning_key for run in runs}) == 1


def test_a_grid_makes_a_row_of_every_combination(folder):
    (folder / "small" / "table.yaml").write_text(
        "title: Grid\nscenes: {cars: [three_cars]}\nseeds: [0]\n"
        "grid: {penalty.reward_weight: [0, 1], penalty.terms.penalty.weight: [2, 3]}\n"
        "overrides: ['penalty.terms.finetuning.weight=${penalty.terms.penalty.weight}']\n"
    )
    runs = plan.plan("small", *read_table(folder / "small", []))
    terms = [run.settings.penalty.terms for run in runs]
    weights = [(each["reward"].weight, each["finetuning"].weight) for each in terms]
    assert weights == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert runs[0].row == "reward_weight=0, terms.penalty.weight=2"


def test_a_run_is_composed_as_its_process_will_compose_it(folder):
    settings, overrides = read_table(folder / "small", ["debug=default"])
    for run in plan.plan("small", settings, overrides):
        again = settings_of(compose("run", [*run.overrides, "paths.output=unknown"]))
        assert again.seed == run.seed and again.method == run.settings.method
        assert again.learning == run.settings.learning


@pytest.mark.parametrize(
    "own",
    [
        ["logger=none", "layout=benchmark", "instances.fit=pad"],
        ["logger=wandb"],  # which reads the group
        ["group=mine"],
        ["learning.semantic.steps=ten"],
    ],
    ids=str,
)
def test_a_row_composed_once_is_what_each_scene_composes_to(own):
    scenes = ("alike_two_cups", "mixed_flower_bird", "nosuch")
    cells = {
        scene: [
            f"instances={scene}",
            f"group=methods-{scene}",
            "tags=[methods]",
            "method=break_a_scene",
            *own,
        ]
        for scene in scenes
    }
    found = plan.compose_row(cells)
    assert found == {scene: plan.compose_cell(given) for scene, given in cells.items()}
    assert found["nosuch"][1] and (found["alike_two_cups"][0] is None) == (own[0][:8] == "learning")


def test_a_row_is_composed_once(folder, monkeypatch):
    composed = []
    whole = plan.compose
    monkeypatch.setattr(plan, "compose", lambda task, given: composed.append(task) or whole(task, given))
    plan._instances.cache_clear()
    scenes = "table.scenes={all: [three_cars, alike_*, rare_*]}"
    rows = "table.rows={a: [method=mifo], b: [guidance=none]}"
    runs = plan.plan("small", *read_table(folder / "small", [scenes, rows]))
    assert composed.count("run") == 2 and composed.count("layout") == len(runs) / 4


def test_what_is_done_is_not_done_again_and_other_settings_are(folder, made, capsys):
    assert table(["small", "table.workers=0"]) == 0
    assert len(made) == 4
    text = (results(folder) / "table.md").read_text()
    assert "4 of 4 runs" in text and "colour@000000000000 (test)" in text
    assert table(["small", "table.workers=0"]) == 0
    assert len(made) == 4
    assert table(["small", "table.workers=0", "learning.semantic.steps=7"]) == 0
    assert len(made) == 8


def test_other_code_makes_runs_again_unless_any_counts(folder, made, monkeypatch):
    table(["small", "table.workers=0"])
    changed = CodeVersion("f" * 12, "c" * 40, True)
    monkeypatch.setattr(execute, "code_version", lambda: changed)
    table(["small", "table.workers=0", "table.code=any", "table.results=any"])
    assert len(made) == 4
    table(["small", "table.workers=0", "table.results=new"])
    assert len(made) == 8
    assert "cccccccc (dirty) × 4" in Path("new/table.md").read_text()


def test_the_repository_around_an_installed_or_copied_package_is_not_its_own(tmp_path):
    def git(folder, *arguments):
        me = ("-c", "user.name=me", "-c", "user.email=me@example.org")
        done = subprocess.run(
            ["git", "-C", folder, *me, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def version(root):
        return identity.version_of(root / "mifo", root / "conf")

    own, other = tmp_path / "own", tmp_path / "other"
    for folder in ("mifo", "conf"):
        (own / folder).mkdir(parents=True)
        (own / folder / "__init__.py").touch()
    copied, installed = other / "third_party", other / "venv"
    shutil.copytree(own, copied)
    for root in (own, other):
        git(root, "init", "--quiet")
        git(root, "add", ".")
        git(root, "commit", "--quiet", "--message", "all")
    shutil.copytree(own / "mifo", installed / "mifo")
    assert version(own).name == git(own, "rev-parse", "HEAD") and version(own).dirty is False
    (own / "conf" / "__init__.py").write_text("changed")
    assert version(own).dirty
    for root in (copied, installed):
        found = version(root)
        assert (found.commit, found.dirty, found.digest) == (None, None, version(own).digest)
        assert found.name == f"{metadata.version('mifo')}+{found.digest}"


def test_code_without_git_is_not_recorded_as_clean(folder, made, monkeypatch):
    def version(git):
        monkeypatch.setattr(identity, "_git", git)
        return identity.code_version.__wrapped__()  # not cached

    own = {"ls-files": "mifo/__init__.py", "rev-parse": "c" * 40, "status": ""}
    clean = version(lambda _, command, *given: own[command])
    assert (clean.commit, clean.dirty, str(clean)) == ("c" * 40, False, "cccccccc")
    without = version(lambda *given: None)
    assert (without.commit, without.dirty) == (None, None)
    assert str(without) == f"{without.digest[:8]} (no git)"

    monkeypatch.setattr(execute, "code_version", lambda: without)
    table(["small", "table.workers=0", "table.results=here"])
    assert f"code {without} × 4;" in Path("here/table.md").read_text()
    with open("here/runs.csv") as file:
        assert {(row["code"], row["dirty"]) for row in csv.DictReader(file)} == {(without.digest, "")}
    for path in folder.glob("outputs/runs/*/table_run.json"):  # as they were written before
        record = json.loads(path.read_text())
        assert record["dirty"] is None
        path.write_text(json.dumps(record | {"dirty": False}))
    table(["small", "table.workers=0", "table.results=there"])
    assert f"code {without} × 4;" in Path("there/table.md").read_text()
    assert Path("there/runs.csv").read_text() == Path("here/runs.csv").read_text()


def test_a_table_of_what_is_finished_makes_nothing(folder, made):
    assert table(["small", "table.workers=0", "table.seeds=[0]", "table.results=first"]) == 0
    before = list(made)
    assert table(["small", "table.missing=leave", "table.results=all"]) == 2
    text = (folder / "all" / "table.md").read_text()
    assert made == before and "2 of 4 runs" in text and text.count("not made yet") == 2


def test_runs_that_learn_the_same_learn_once(folder, made):
    rows = "table.rows={a: [guidance=mifo], b: [guidance=none]}"
    table(["small", "table.workers=0", rows, "table.seeds=[3]"])
    assert made == [("mifo", 3, "learned"), ("mifo", 3)]


def test_runs_lie_in_folders_of_any_name(folder, made):
    """Runs and results below folders whose names the command line must quote."""
    assert table(["small", "table.runs=it's, all", "table.results=say 'it'", "table.seeds=[0]"]) == 0
    assert len(made) == 2 and len([*Path("it's, all").iterdir()]) == 2


@pytest.mark.parametrize(
    ("given", "own"),
    [
        (["exclusive_gpu=true"], True),
        (["++exclusive_gpu=True"], True),
        (["exclusive_gpu=true", "exclusive_gpu=false"], False),
        ([], False),
    ],
)
def test_a_launcher_is_told_whether_a_process_wants_a_gpu_of_its_own(folder, monkeypatch, given, own):
    asked = []
    monkeypatch.setattr("mifo.commands.table.launcher", lambda *arguments: asked.append(arguments[-1]))
    with pytest.raises(MifoError, match="no run of the table is finished"):
        table(["small", *given, "table.missing=leave"])
    assert asked == [own]


def test_a_bad_row_and_a_failing_run_spoil_nothing_else_and_are_named(folder, made, monkeypatch, capsys):
    whole = execute.perform
    monkeypatch.setattr(execute, "perform", lambda s: 1 / 0 if s.seed == 1 else whole(s))
    rows = "table.rows={MIFO: [method=mifo], bad: [learning.semantic.steps=ten]}"
    assert table(["small", "table.workers=0", rows]) == 3
    text = (results(folder) / "table.md").read_text()
    assert "1 of 4 runs" in text
    assert "learning.semantic.steps: Value 'ten'" in text and "ZeroDivisionError" in text
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("refused:")]
    assert told.startswith("refused: 2 of 4 runs: learning.semantic.steps: Value 'ten'")
    monkeypatch.setattr(execute, "perform", whole)
    assert table(["small", "table.workers=0", rows]) == 2  # what failed is tried again
    assert made == [("mifo", 0, "learned"), ("mifo", 1, "learned")]


class Killed(BaseException):
    """Stands for the end of a process."""


def test_a_process_that_dies_costs_its_own_run_alone(folder, made, monkeypatch):
    whole, launched = execute.perform, []

    def perform(settings):
        if (settings.method, settings.seed) == ("mifo", 0):
            raise Killed
        whole(settings)

    def launch(jobs):
        launched.append(len(jobs))
        try:
            for job in jobs:
                execute.make_runs(*job)
        except Killed as error:
            raise RuntimeError("a process of the launcher died") from error

    monkeypatch.setattr(execute, "perform", perform)
    monkeypatch.setattr("mifo.commands.table.launcher", lambda *given: launch)
    assert table(["small"]) == 1
    assert launched == [4, 1, 3] and len(made) == 3
    assert "stopped by a signal" in (results(folder) / "table.md").read_text()
    monkeypatch.setattr(execute, "perform", whole)
    assert table(["small", "hydra/launcher=basic"]) == 0  # and writes to the same folder
    assert launched == [4, 1, 3, 1] and len(made) == 4


def test_a_launcher_that_never_starts_is_one_sentence(folder, made, monkeypatch):
    def launch(jobs):
        raise ConnectionError("no cluster at this address")

    monkeypatch.setattr("mifo.commands.table.launcher", lambda *given: launch)
    with pytest.raises(MifoError, match=r"the launcher failed.*no cluster at this address"):
        table(["small"])


def test_several_groups_go_to_one_job(folder, made, monkeypatch):
    jobs = []
    monkeypatch.setattr("mifo.commands.table.launcher", lambda *given: jobs.extend)
    with pytest.raises(MifoError, match="no run of the table is finished"):
        table(["small", "table.per_job=3"])
    assert [len(job) for job in jobs] == [3, 1]


@pytest.mark.parametrize("missing", ["run", "leave"])
def test_a_table_whose_runs_are_all_refused_ends_with_the_reason(folder, made, mifo, capsys, missing):
    shared = ["table", "small", "table.workers=0", f"table.missing={missing}"]
    assert mifo(*shared, "learning.stesp=3") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("mifo: error: every run of the table is refused: ")
    assert told.count("learning.stesp") == 1 and "see mifo run --help" in told
    rows = "table.rows={a: [learning.semantic.steps=ten], b: [penalty=mif]}"
    assert mifo(*shared, rows) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "2 of 4 runs: learning.semantic.steps" in told and "2 of 4 runs: penalty=mif does not" in told
    assert not made and not (folder / "outputs").exists()


def test_a_table_of_which_nothing_is_finished_says_so(folder, made):
    with pytest.raises(MifoError, match="make them without"):
        table(["small", "table.missing=leave"])


def test_figures_of_different_evaluators_are_refused(folder, made):
    table(["small", "table.workers=0"])
    path = next((folder / "outputs" / "runs").glob("*/scores.json"))
    content = json.loads(path.read_text().replace("colour", "other"))
    del content["checksum"]
    path.write_text(json.dumps(content))
    with pytest.raises(MifoError, match="was measured by"):
        table(["small", "table.workers=0"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere"),
        (["small", "table.plto=dots"], "plto"),
        (["small", "table.plot=pie"], "pie"),
        (["small", "table.columns=[beauty]"], "beauty"),
        (["small", "table.scenes={a: [nothing]}"], "nothing"),
        (["small", "table.seeds=[]"], "seeds"),
        (["small", "table.seeds=[0,1,0]"], r"seeds=\[0, 1, 0\] names a seed twice"),
        (["small", "table.pages=[tree_cars]"], "table.pages: tree_cars is no scene.*did you mean three_cars"),
        (["small", "table.workers=many"], "table.workers: Value 'many'"),
        (["small", "table.per_job=0"], "table.per_job"),
        (["small", "hydra/launcher=jobs"], "hydra/launcher=jobs does not exist; .*use one of"),
        (["small", "hydra.launcher.n_jobs=2"], "hydra.launcher.n_jobs"),
        (["small", "table.seeds.a=3"], r"table\.seeds=.* must be written as \["),
        (["small", "table.rows={a: [method=mifo"], "a table.KEY=VALUE cannot be read"),
        (["small", "table.rows={a, b: [method=mifo]}"], "table.rows.a: .* quote a label"),
    ],
)
def test_refusals_name_what_is_wrong(folder, arguments, words):
    with pytest.raises(MifoError, match=words):
        table(arguments)


def test_an_unknown_key_of_a_table_is_refused_in_one_sentence(folder, mifo, capsys):
    assert mifo("table", "small", "table.sedes=[0]") == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told.startswith("mifo: error: table.sedes is no key of a table; did you mean table.seeds?")
    with open("small/table.yaml", "a") as file:
        file.write("plto: dots\n")
    assert mifo("table", "small") == 2
    assert "small/table.yaml: plto is no key of a table; did you mean plot?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["instances=three_cars"], "instances=three_cars would .*table.scenes={three_cars: "),
        (["++instances=three_cars"], "table.scenes"),
        (["seed=7"], r"seed=7 would .*table.seeds=\[7\]"),
        (["method=no_penalty"], r"row 'none'.*table.rows={LABEL: \[method=no_penalty\]}"),
        (["+method@_global_=no_penalty"], "table.rows"),
        (["penalty=none"], r"row 'none'.*table.rows={LABEL: \[penalty=none\]}"),
        (["table.overrides=[seed=7]"], "table.seeds"),
        (["penalty=none", "table.rows={a: [penalty=mifo]}"], "row 'a'.*table.rows"),
        (["guidance=none", "table.rows={a: [], b: [guidance=mifo]}"], "row 'b'.*table.rows"),
        (["penalty.reward_weight=2", "table.grid={penalty.reward_weight: [0, 1]}"], "table.grid"),
    ],
)
def test_an_override_that_belies_the_labels_is_refused(folder, arguments, words):
    with pytest.raises(MifoError, match=words):
        read_table(folder / "small", arguments)


def test_an_override_of_what_no_label_names_is_accepted(folder):
    given = ["model=sd21", "guidance=none", "instances.fit=pad", "learning.semantic.steps=7"]
    assert read_table(folder / "small", given)[1] == given
    weights = ROOT / "experiments" / "loss_weights"
    assert (
        "penalty.terms.finetuning.weight=1" in read_table(weights, ["penalty.terms.finetuning.weight=1"])[1]
    )
    # what a table's own file says of every run is part of the table
    with open("small/table.yaml", "a") as file:
        file.write("overrides: [method=mifo]\n")
    assert read_table(folder / "small", ["model=sd21"])[1] == ["method=mifo", "model=sd21"]


def test_a_label_with_a_comma_is_quoted_on_the_command_line(folder):
    settings, _ = read_table(folder / "small", ['table.rows={"a, b": [method=mifo]}'])
    assert settings.rows == {"a, b": ["method=mifo"]}


def test_a_folder_of_results_holds_one_table_ever(folder, made):
    table(["small", "table.workers=0", "table.results=here"])
    with pytest.raises(MifoError, match="another folder"):
        table(["small", "table.workers=0", "table.results=here", "table.seeds=[5]"])


def test_a_row_that_lacks_scenes_is_not_the_best():
    whole = {"leakage": Estimate(0.2, 0.1, 3, 3, 3)}
    found = {("MIFO", "a"): whole, ("none", "a"): {"leakage": Estimate(0.3, 0.1, 3, 3, 3)}}
    assert _best(found, ["leakage"]) == {("MIFO", "a", "leakage")}
    for part in (Estimate(0.1, 0.1, 2, 2, 2), estimate_runs({("one", seed): 0.1 for seed in range(5)})):
        assert _best(found | {("part", "a"): {"leakage": part}}, ["leakage"]) == {("MIFO", "a", "leakage")}


def test_the_written_forms_agree(folder, made):
    table(["small", "table.workers=0"])
    found = results(folder)
    with open(found / "runs.csv") as file:
        raw = list(csv.DictReader(file))
    mean = np.mean([float(row["editability"]) for row in raw if row["row"] == "MIFO"])
    with open(found / "table.csv") as file:
        (row,) = [r for r in csv.DictReader(file) if (r["row"], r["metric"]) == ("MIFO", "editability")]
    assert float(row["mean"]) == pytest.approx(mean) == 0.55
    assert "**0.550 ±" in (found / "table.md").read_text()
    assert r"$\mathbf{0.550} \pm" in (found / "table.tex").read_text()
    assert (found / "table.png").stat().st_size > 5000 and (found / "table.pdf").is_file()
    # the difference is the same for both seeds, so that its interval is empty
    assert "| none | cars | -0.500 ± 0.000 |" in (found / "table.md").read_text()


def test_sets_of_like_names_have_pages_of_their_own(folder, made, monkeypatch):
    without_pictures = execute.perform

    def run(settings):
        without_pictures(settings)
        picture = Picture(torch.zeros(3, 32, 32), "a photo of <asset0>")
        save_pictures(Path(settings.paths.output) / "pictures", [picture])

    monkeypatch.setattr(execute, "perform", run)
    table(["small", "table.workers=0", "table.scenes={two cars: [three_cars], two-cars: [three_cars]}"])
    told = (results(folder) / "table.md").read_text()
    assert "](pictures-two-cars.jpg)" in told and "](pictures-two-cars-2.jpg)" in told
    assert newest_results("smal") is None and newest_results("small") is not None


def test_a_page_shows_each_row_on_one_scene_and_seed(folder, made, monkeypatch):
    colours = {"mifo": (0.9, 0.1, 0.1), "no_attention_loss": (0.1, 0.1, 0.9)}
    without_pictures = execute.perform

    def run(settings):
        without_pictures(settings)
        if (settings.method, settings.seed) != ("mifo", 0):  # so that seed 1 alone has all rows
            image = torch.tensor(colours[settings.method])[:, None, None].expand(3, 32, 32)
            pictures = [Picture(image, f"a photo of <asset0> in the {place}") for place in ("snow", "jungle")]
            save_pictures(Path(settings.paths.output) / "pictures", pictures)

    monkeypatch.setattr(execute, "perform", run)
    monkeypatch.delitem(LABELS, "leakage")  # a metric of one's own has none
    table(["small", "table.workers=0"])
    assert "](pictures-cars.jpg)" in (results(folder) / "table.md").read_text()
    page = np.asarray(Image.open(results(folder) / "pictures-cars.jpg").convert("RGB")) / 255.0
    found = {}
    for method, colour in colours.items():
        rows, _ = np.where((np.abs(page - colour) < 0.1).all(-1))
        assert len(rows) > 1.8 * SIDE**2  # two pictures
        found[method] = rows.mean()
    assert found["mifo"] + SIDE < found["no_attention_loss"]

    for picture in (folder / "outputs" / "runs").glob("*/pictures/000.png"):
        picture.unlink()
    assert not table(["small", "table.workers=0", "table.results=spoilt", "table.seeds=[1]"])
    assert (folder / "spoilt" / "table.md").is_file() and not list((folder / "spoilt").glob("*.jpg"))

    table(["small", "table.workers=0", "table.results=none", "table.pages=[]"])
    assert (
        not list((folder / "none").glob("*.jpg")) and "jpg" not in (folder / "none" / "table.md").read_text()
    )


@pytest.fixture
def drawn(monkeypatch):
    """Runs that take no time and have a picture, a curve, and something that was learned."""

    def run(settings):
        folder = Path(settings.paths.output)
        (folder / "learned").mkdir()
        (folder / "learned" / "learned.json").write_text("{}")
        (folder / "csv").mkdir()
        (folder / "csv" / "metrics.csv").write_text("step,semantic/loss/total\n1,0.5\n2,0.25\n")
        picture = Picture(torch.full((3, 32, 32), 0.5), "a photo of <asset0>", {}, settings.seed)
        save_pictures(folder / "pictures", [picture])
        score = Score("leakage", settings.seed / 10, False, Evaluator("colour", "0" * 12), "test")
        Evaluation((score,), ({"leakage": settings.seed / 10},)).save(folder / "scores.json")

    monkeypatch.setattr(execute, "perform", run)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def sent(folder):
    """The offline runs of Weights & Biases below a folder."""
    return [read_offline_run(run) for run in sorted(folder.glob("**/wandb/offline-run-*"))]


@pytest.mark.slow
def test_finished_runs_are_sent_once_with_their_row_and_set(folder, drawn, capsys, monkeypatch):
    asked = ["small", "table.columns=[leakage]", "logger=none"]
    assert table(asked) == 0 and not sent(folder)
    assert table([*asked, "table.send=true"]) == 0
    told = sent(folder / "outputs" / "runs")
    found = {(run.config["row"], run.config["set"], run.config["table"], run.config["seed"]) for run in told}
    assert found == {(row, "cars", "small", seed) for row in ("MIFO", "none") for seed in (0, 1)}
    assert {run.name for run in told} >= {"MIFO, seed 0, three_cars", "none, seed 1, three_cars"}
    for run in told:
        assert run.job_type == "run" and run.exit_code == 0 and run.tags == ("small",)
        assert run.history["evaluation/leakage"] == run.config["seed"] / 10
        assert run.history["semantic/loss/total"] == 0.25
        assert list(run.artifacts["learned"]) == [
            f"three_cars-{run.config['method']}-seed-{run.config['seed']}"
        ]
    (written,) = sent(results(folder))
    assert (written.name, written.job_type, written.group) == ("Small", "table", "small")
    assert {"table/plot", "table/pages", "table/estimates"} <= {
        key.removesuffix("/_type") for key in written.history
    }
    assert "table.csv" in written.artifacts["table"]["table-small"]

    capsys.readouterr()
    (half,) = (folder / "outputs" / "runs").glob(f"*/wandb/offline-run-*-{told[0].id}")
    (half.parents[1] / ".sending").touch()  # as a kill leaves it
    assert table([*asked, "table.send=true"]) == 0
    assert "sent: 1 runs, and 3 were there before" in capsys.readouterr().out
    again = sent(folder / "outputs" / "runs")
    assert len(again) == 5 and {run.id for run in again} == {run.id for run in told}

    monkeypatch.setattr("mifo.commands.send.log_table", Mock(side_effect=wandb.errors.CommError("busy")))
    with pytest.raises(MifoError, match=r"did not take everything \(busy\); repeat the command"):
        table([*asked, "table.send=true"])


@pytest.mark.parametrize("rows", ["1,0.5\n2", "1,0.5\n2,0.2", "x,0.5\n", "1,x\n", "1,nan\n", '1,"0.5\n'])
def test_a_damaged_curve_is_not_sent(tmp_path, rows):
    (tmp_path / "metrics.csv").write_text(f"step,semantic/loss/total\n{rows}")
    with pytest.raises(MifoError, match=r"metrics\.csv is damaged"):
        log_curves([], tmp_path / "metrics.csv")


def test_runs_of_a_table_are_logged_where_a_logger_is_chosen(folder, made, monkeypatch):
    seen = []
    run = execute.perform
    monkeypatch.setattr(execute, "perform", lambda settings: seen.append(settings) or run(settings))
    (folder / "small" / "table.yaml").write_text(f"{SMALL}overrides: [logger=none]\n")
    assert table(["small", "logger=wandb", "table.seeds=[1]"]) == 0
    assert [(each.origin.table, each.origin.row, each.origin.set) for each in seen] == [
        ("small", "MIFO", "cars"),
        ("small", "none", "cars"),
    ]
    names = [(each.logger["wandb"]["name"], each.logger["wandb"]["group"]) for each in seen]
    assert names[1] == ("none, seed 1, three_cars", "small-none-three_cars")


def test_an_interval_is_that_of_students_t():
    values = [0.3, 0.5, 0.4, 0.9]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    found = estimate(values, 8, 4)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert (found.count, found.runs) == (4, 8)
    assert estimate([1.0], 1, 1).half is None


def test_seeds_of_a_scene_count_as_one_value_where_there_are_several_scenes():
    values = {("a", 0): 0.0, ("a", 1): 0.2, ("b", 0): 0.4, ("b", 1): 0.6}
    assert estimate_runs(values) == estimate([0.1, 0.5], 4, 2)
    assert estimate_runs({key: value for key, value in values.items() if key[0] == "a"}).count == 2


def test_differences_are_paired():
    runs = [
        Measured(row, "s", scene, 0, {"leakage": value})
        for row, values in {"A": {"x": 0.1, "y": 0.7, "z": 0.2}, "B": {"x": 0.2, "y": 0.8}}.items()
        for scene, value in values.items()
    ]
    found = differences(runs, ["leakage"], "A")["B", "s"]["leakage"]
    assert found.mean == pytest.approx(0.1) and found.half == pytest.approx(0) and found.count == 2
    assert cells(runs, ["leakage"])["A", "s"]["leakage"].mean == pytest.approx(1 / 3)


def test_the_pareto_front_holds_what_nothing_beats():
    points = [(0.1, 0.9), (0.5, 0.5), (0.4, 0.4), (0.9, 0.1), (0.5, 0.2), (0.1, 0.8)]
    assert pareto_front(points) == [0, 1, 3]
    assert pareto_front([(0.2, 0.2), (0.2, 0.2)]) in ([0], [1])


@pytest.mark.parametrize("kind", ["dots", "lines", "pareto"])
def test_a_plot_shows_which_rows_lack_scenes(kind):
    """Such a row may have the easy scenes alone: its point is hollow, and on no front."""
    names = ["editability", "instance_consistency"]
    found = {
        (row, "a"): {name: estimate(values, 2, 2) for name in names}
        for row, values in {"MIFO": [0.2, 0.4], "none": [0.3, 0.4], "part": [0.9]}.items()
    }

    def drawn(given):
        figure = draw_table(given, names, kind, "Title")
        points = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "o"]
        hollow = [line.get_xydata()[0] for line in points if line.get_markerfacecolor() == "white"]
        told = [each.get_text() for legend in figure.legends for each in legend.findobj(Text)]
        return figure, hollow, any("of fewer scenes than another row has" in each for each in told)

    figure, hollow, told = drawn(found)
    assert len(hollow) == len(figure.axes) and all(0.9 in point for point in hollow) and told
    if kind == "pareto":
        assert figure.axes[0].lines[0].get_xydata().tolist() == [[0.35, 0.35]]
    assert drawn({cell: each for cell, each in found.items() if cell[0] != "part"})[1:] == ([], False)


@pytest.mark.parametrize("kind", ["dots", "lines"])
def test_intervals_end_where_the_range_does(kind):
    found = {("A", scenes): {"leakage": estimate([0.2, 0.9], 2, 2)} for scenes in ("2", "3")}
    (axes,) = draw_table(found, ["leakage"], kind, "Title").axes
    ends = np.concatenate([bar for lines in axes.collections for bar in lines.get_segments()])
    along = ends[:, 0 if kind == "dots" else 1]
    assert estimate([0.2, 0.9], 2, 2).half > 1 and (along.min(), along.max()) == pytest.approx((0, 1))


def test_a_legend_of_many_sets_stays_on_the_page_and_tells_them_apart() -> None:
    sets = [f"a set of scenes, number {index}" for index in range(12)]
    figure = draw_table(
        {("MIFO", each): {"leakage": Estimate(0.2, 0.1, 8, 8, 8)} for each in sets}, ["leakage"], "dots", ""
    )
    figure.draw_without_rendering()
    (legend,) = figure.legends
    page, place = figure.bbox, legend.get_window_extent()
    assert page.x0 <= place.x0 and place.x1 <= page.x1
    looks = {
        (line.get_color(), line.get_marker())
        for line in figure.axes[0].get_lines()
        if line.get_marker() in "osD"
    }
    assert len(looks) == 12


@pytest.mark.parametrize("kind", ["dots", "lines", "pareto"])
def test_a_plot_shows_every_mean(kind):
    found = {
        (row, scenes): {
            metric: estimate([0.1 * i, 0.1 * i + 0.05], 2, 2)
            for metric in ("editability", "instance_consistency")
        }
        for i, (row, scenes) in enumerate([("A", "2"), ("B", "2"), ("A", "3"), ("B", "3")])
    }
    figure = draw_table(found, ["editability", "instance_consistency"], kind, "Title")
    means = {round(each["editability"].mean, 6) for each in found.values()}
    shown = {
        round(float(value), 6)
        for axes in figure.axes
        for line in axes.lines
        for value in [*line.get_xdata(), *line.get_ydata()]
    }
    assert means <= shown


def test_a_pareto_plot_without_its_scores_is_refused_and_a_set_without_them_stays_empty(folder):
    with pytest.raises(MifoError, match=r"pareto.*add editability to table\.columns"):
        read_table(folder / "small", ["table.plot=pareto", "table.columns=[leakage, instance_consistency]"])
    whole = {metric: estimate([0.1, 0.2], 2, 2) for metric in PARETO}
    figure = draw_table(
        {("A", "2"): whole, ("A", "3"): {"editability": whole["editability"]}}, [], "pareto", ""
    )
    assert [len(axes.texts) for axes in figure.axes] == [1, 0]  # a number beside each point


def test_an_override_of_what_a_row_sets_is_repeated_as_it_was_typed(folder):
    key = "optimizer@learning.finetuning.optimizer"
    given = [f"table.rows={{slow: ['{key}=adamw']}}", f"{key}=prodigy"]
    with pytest.raises(
        MifoError, match=rf"table's row 'slow'.*give 'table.rows={{LABEL: \[{key}=prodigy\]}}'"
    ):
        read_table(folder / "small", given)


def test_an_override_that_levels_what_methods_differ_in_is_refused(folder):
    rows = "table.rows={both: [method=mifo], one: [method=stage2_only]}"
    with pytest.raises(MifoError, match=r"steps is \d+ in .*row 'both' and 0 in its row 'one'.*table.rows"):
        plan.plan("small", *read_table(folder / "small", [rows, "learning.semantic.steps=7"]))
    alike = [rows, "learning.prior.weight=0", "performance.cuda_graphs=true"]
    runs = plan.plan("small", *read_table(folder / "small", alike))
    assert runs and all(run.settings.learning.prior.weight == 0 for run in runs)


@pytest.mark.slow
def test_a_killed_table_is_continued(folder):
    """Real processes: the command is killed while its first run works, and continued to the end."""
    source = tiny_pipeline(folder / "pipeline")
    command = [
        *(sys.executable, "-m", "mifo", "table", "small", "debug=fast_dev_run", "device=cpu", "logger=none"),
        *("model=local", f"model.source={source}", "metrics=miniature", "metrics.windows=2"),
        "table.seeds=[0]",
    ]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(folder.glob("outputs/runs/*/status.json")) and time.monotonic() < until:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs" in (results(folder) / "table.md").read_text()
    records = [path.read_text() for path in folder.glob("outputs/runs/*/status.json")]
    assert [json.loads(record)["status"] for record in records] == ["ok", "ok"]


def test_a_record_is_extended_by_a_row(folder, made, capsys):
    assert table(["small", "table.results=first", "table.workers=0"]) == 0
    shutil.rmtree(folder / "outputs")
    made.clear()
    more = "table.rows={MIFO: [method=mifo], mine: [penalty.terms.penalty.weight=0.7]}"
    asked = ["small", more, "table.record=first", "table.workers=0"]
    assert table([*asked, "table.missing=leave", "table.results=left"]) == 2
    assert not made
    assert table([*asked, "table.results=second"]) == 0
    assert [seed for _, seed, _ in made] == [0, 1]
    assert "2 of 4 runs stand in first" in capsys.readouterr().out
    before, after = (
        [row for row in csv.DictReader((folder / name / "runs.csv").open()) if row["row"] == "MIFO"]
        for name in ("first", "second")
    )
    assert before == after
    assert "4 of 4 runs" in (folder / "second" / "table.md").read_text()


def test_parts_that_several_machines_made_become_one_table(folder, made):
    for seed in (0, 1):
        table(["small", f"table.results=part{seed}", f"table.seeds=[{seed}]"])
        shutil.rmtree("outputs/runs")
    made.clear()
    parts = "table.record=[part0, part1]"
    assert table(["small", parts, "table.missing=leave", "table.results=whole", "table.seeds=[0,1]"]) == 0
    assert not made and "4 of 4 runs" in (folder / "whole" / "table.md").read_text()
    with pytest.raises(MifoError, match=r"table\.seeds=-1 is no seed"):
        table(["small", "table.seeds=[0, -1]"])
    with pytest.raises(MifoError, match=r"table\.record=7 must be a folder of results, or several"):
        table(["small", "table.record=7"])


def test_a_record_does_not_shrink(folder, made):
    asked = ["small", "table.results=first", "table.workers=0"]
    table(asked)
    before = (folder / "first" / "runs.csv").read_text()
    shutil.rmtree(next((folder / "outputs" / "runs").iterdir()))
    told = (
        r"first would lose 1 runs .* such as '.*, three_cars, seed \d' \(not made yet\).* table\.record=first"
    )
    with pytest.raises(MifoError, match=told):
        table([*asked, "table.missing=leave"])
    assert (folder / "first" / "runs.csv").read_text() == before
    assert table([*asked, "table.missing=leave", "table.record=first"]) == 0
    assert (folder / "first" / "runs.csv").read_text() == before


def write_unchecked(path):
    """Leave out the checksums of a record, as earlier versions did, so that it can be changed."""
    with path.open(newline="") as file:
        rows = [row[:-1] for row in csv.reader(file)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_a_record_of_other_evaluators_is_refused(folder, made):
    table(["small", "table.results=first", "table.workers=0"])
    shutil.rmtree(folder / "outputs")
    path = folder / "first" / "evaluators.json"
    path.write_text(path.read_text().replace("0" * 12, "1" * 12))
    write_unchecked(folder / "first" / "runs.csv")
    with pytest.raises(MifoError, match="evaluate both with the same"):
        table(
            ["small", "table.record=first", "table.results=second", "table.workers=0", "table.seeds=[0,1,2]"]
        )


def test_a_table_with_missing_runs_ends_with_a_sentence(folder, made, mifo, capsys):
    asked = ["table", "small", "table.workers=0", "table.results=here"]
    assert mifo(*asked) == 0 and "mifo: error" not in capsys.readouterr().err
    assert mifo(*asked, "table.seeds=[0,1,7]", "table.missing=leave", "table.results=more") == 1
    assert "mifo: error: 2 runs have no result; why stands above" in capsys.readouterr().err


def test_records_that_do_not_serve_are_refused(folder, made):
    table(["small", "table.results=first", "table.workers=0"])
    made.clear()
    with pytest.raises(MifoError, match=r"small holds no record of a table: its evaluators\.json"):
        table(["small", "table.record=small"])
    with pytest.raises(MifoError, match=r"none of the 4 runs of table\.record=first .* question\.json"):
        table(["small", "table.record=first", "synthesis.samples=3"])
    write_unchecked(folder / "first" / "runs.csv")
    rows = (folder / "first" / "runs.csv").read_text()
    (folder / "first" / "runs.csv").write_text(rows.replace("editability", "beauty"))
    with pytest.raises(MifoError, match=r"first/runs\.csv is damaged: it lacks the column editability"):
        table(["small", "table.record=first"])
    (folder / "first" / "runs.csv").write_text(rows.rpartition(",")[0] + ",0\n")
    with pytest.raises(MifoError, match=r"first/runs\.csv is damaged: line \d, folder: '0' is no name of"):
        table(["small", "table.record=first"])
    assert not made


@pytest.mark.parametrize("record", RECORDS, ids=str)
def test_the_records_of_the_repository_can_be_extended(record):
    entries = read_record(record.parent)
    rows = list(csv.DictReader(record.open()))
    assert len(entries) == len({row["folder"] for row in rows})
    told = (record.parent / "table.md").read_text()
    for entry in entries.values():
        assert all(f"{score.evaluator} ({score.protocol})" in told for score in entry.scores)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("metrics.fit=pad", "differ in metrics.fit"),
        ("layout=spread", "differ in layout"),
        ("metrics=none", "leaves its runs without a figure"),
    ],
)
def test_rows_whose_figures_do_not_compare_are_refused_before_they_are_made(other, words):
    settings = TableSettings(
        title="two", rows={"one": [], "other": [other]}, scenes={"cars": ["three_cars"]}, seeds=[0]
    )
    with pytest.raises(MifoError, match=words):
        plan.plan("two", settings, [])


def test_other_masks_make_another_run(tmp_path):
    for name, colour in (("img.png", "red"), ("mask0.png", "white")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
    settings = TableSettings(title="own", rows={"one": []}, scenes={"own": ["local"]}, seeds=[0])
    own = [f"instances.folder={tmp_path}", "instances.class_names=[car]"]
    keys = []
    for side in (64, 32):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, side, 64))
        mask.save(tmp_path / "mask0.png")
        (run,) = plan.plan("own", settings, own)
        keys.append(run.key)
    assert len(set(keys)) == 2


@pytest.mark.parametrize("path", RECORDS, ids=str)
def test_the_tables_of_the_repository_follow_from_their_records(path, tmp_path, monkeypatch):
    monkeypatch.setattr("mifo.tables.write.draw_table", lambda *given: Figure())
    kept, question = read_record(path.parent), json.loads((path.parent / "question.json").read_text())
    known = {key: question[key] for key in ("title", "rows", "grid", "scenes", "seeds", "columns")}
    settings = TableSettings(**known, plot="dots")
    ended = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            run = Run(row["row"], row["scenes"], row["instances"], int(row["seed"]), (), None)
            ended.append(execute.Done(run, None, kept=kept[row["folder"].partition("-")[0]]))
    write_table(tmp_path, "mifo table", settings, ended)
    if "checksum" not in path.open().readline():  # it is an older record
        write_unchecked(tmp_path / "runs.csv")
    for name in ("runs.csv", "evaluators.json"):
        # older records say that nothing was changed where nobody knows
        recorded = (path.parent / name).read_bytes().replace(b",False,", b",,")
        assert (tmp_path / name).read_bytes().replace(b",False,", b",,") == recorded, name
    for name, shown in (("table.csv", ""), ("table.tex", ""), ("table.md", "| ")):
        # a record's values have six digits, a table was computed from all of them
        (words, numbers), (recorded, figures) = (
            words_and_numbers((folder / name).read_bytes().decode(), shown)
            for folder in (tmp_path, path.parent)
        )
        assert words == recorded and numbers == pytest.approx(figures, abs=2e-3)


def words_and_numbers(text, start):
    lines = [line for line in text.split("\n") if line.startswith(start)]
    pattern = r"(?<![\w.])-?\d+\.\d+"
    return re.sub(pattern, "#", "\n".join(lines)), [
        float(each) for each in re.findall(pattern, "\n".join(lines))
    ]


HOSTILE = r"=cmd|'/c calc'!A1 \input{secret} <script>alert(1)</script> `code` *bold* [link](x) $x$ %"


def test_labels_are_text_in_every_form(tmp_path):
    evaluator = Evaluator("colour|<b>", "0" * 12)
    runs = [Run(row, "cars", "three_cars", 0, (), None) for row in (HOSTILE, "-1")]
    scores = (Score("editability", 0.5, True, evaluator, "test"),)
    settings = TableSettings(title=HOSTILE, columns=["editability"])
    ended = [execute.Done(run, None, kept=Entry(f"{i}-0", scores, None)) for i, run in enumerate(runs)]
    ended += [execute.Done(runs[0], None, "<script>\n| a |")]
    write_table(tmp_path, f"mifo table small 'table.title={HOSTILE}'", settings, ended)
    for name in ("runs.csv", "table.csv"):
        with open(tmp_path / name, newline="") as file:
            assert {row["row"] for row in csv.DictReader(file)} == {"'" + HOSTILE, "'-1"}
    title, _, command, *others = (tmp_path / "table.md").read_text().splitlines()
    assert command.startswith("``mifo table") and command.endswith("``")  # code may hold anything
    assert not any(re.search(r"(?<!\\)[<\[]", line) for line in [title, *others] if "![" not in line)
    (line,) = [line for line in others if line.startswith("| =cmd")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 6
    comment, *lines = (tmp_path / "table.tex").read_text().splitlines()
    assert comment == "% " + HOSTILE
    (line,) = [line for line in lines if "cmd" in line]
    assert r"\textbackslash input\{secret\}" in line.replace("textbackslash  ", "textbackslash ")


def test_labels_of_several_lines_are_refused(folder):
    with pytest.raises(MifoError, match="must be one line"):
        read_table(folder / "small", [r'table.rows={"a\nb": [method=mifo]}'])


@pytest.mark.parametrize("torn", [b"", b'{"title": "Sm', b"\0" * 400])
def test_a_torn_question_without_results_is_written_anew(tmp_path, torn):
    asked = TableSettings(title="Small"), ["debug=default"]
    (tmp_path / "question.json").write_bytes(torn)
    claim_results(tmp_path, *asked)
    assert json.loads((tmp_path / "question.json").read_text())["title"] == "Small"
    (tmp_path / "question.json").write_bytes(torn)
    (tmp_path / "runs.csv").write_text("row\n")
    with pytest.raises(MifoError, match=r"/question\.json.* delete it if the results beside it"):
        claim_results(tmp_path, *asked)
    assert (tmp_path / "question.json").read_bytes() == torn


@pytest.mark.parametrize(
    ("name", "damage"), [("scores.json", b'{"scores": ['), ("table_run.json", b"[]"), ("status.json", b"")]
)
def test_a_run_with_a_damaged_file_is_made_again(folder, made, monkeypatch, name, damage):
    monkeypatch.setattr("mifo.tables.write.draw_table", lambda *given: Figure())
    rows = "table.rows={MIFO: [method=mifo]}"
    asked = ["small", "table.workers=0", "table.seeds=[0]", "table.results=here", rows]
    assert table(asked) == 0
    before = Path("here/table.csv").read_bytes()
    (path,) = folder.glob(f"outputs/runs/*/{name}")
    path.write_bytes(damage)
    assert table(asked) == 0
    assert json.loads(path.read_text()) and Path("here/table.csv").read_bytes() == before
    assert len(made) == 2


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("runs.csv", lambda content: b""),
        ("runs.csv", lambda content: content[: len(content) // 2]),
        ("runs.csv", lambda content: content.replace(b"0.0", b"nan")),
        ("runs.csv", lambda content: content.replace(b",cars", b",cars,cars")),
        ("runs.csv", lambda content: content.replace(b",cars", b',"cars')),
        ("runs.csv", lambda content: b"\xff" + content),
        ("evaluators.json", lambda content: b"[1]"),
        ("evaluators.json", lambda content: content.replace(b"leakage", b"beauty")),
        ("evaluators.json", lambda content: content.replace(b'"test"', b"1")),
        ("evaluators.json", lambda content: b"[" * 100_000),
        ("evaluators.json", lambda content: content.replace(b'"colour"', b'"colous"')),
    ],
)
def test_a_damaged_record_is_one_sentence_that_names_the_file(tmp_path, name, damage):
    write_two_runs(tmp_path)
    assert len(read_record(tmp_path)) == 2
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(MifoError, match=f"/({name}|runs.csv) (is damaged|cannot be read)"):
        read_record(tmp_path)


def write_two_runs(folder):
    evaluator = Evaluator("colour", "0" * 12)
    scores = tuple(Score(metric, 0.0, True, evaluator, "test") for metric in ("editability", "leakage"))
    runs = [Run(row, "cars", "three_cars", 0, (), None) for row in ("MIFO", "none")]
    names = [f"{number:012x}-{0:012x}" for number in range(2)]
    entries = [(run, Entry(name, scores, About("0"))) for run, name in zip(runs, names, strict=True)]
    write_record(folder, entries)


def test_another_digit_in_a_record_is_noticed(tmp_path):
    write_two_runs(tmp_path)
    path = tmp_path / "runs.csv"
    whole = path.read_text()
    places = range(whole.rindex("three_cars") + len("three_cars,0,"), len(whole))
    for place in (place for place in places if whole[place].isdigit()):
        path.write_text(whole[:place] + str(9 - int(whole[place])) + whole[place + 1 :])
        with pytest.raises(MifoError, match=r"runs\.csv is damaged: line 3"):
            read_record(tmp_path)


def test_values_of_older_records_are_checked_with_line_and_column(tmp_path):
    write_two_runs(tmp_path)
    path = tmp_path / "runs.csv"
    write_unchecked(path)
    whole = path.read_text()
    assert len(read_record(tmp_path)) == 2
    for column, old, new in (
        ("editability", "0.000000,0.000000", "1e5,0.000000"),
        ("leakage", "0.000000,0.0,0", "-0.3,0.0,0"),
        ("leakage", "0.000000,0.0,0", "inf,0.0,0"),
        ("minutes", "0.0,0", "-1,0"),
        ("code", "0.0,0,", "0.0,NaN,"),
        ("dirty", "0.0,0,,", "0.0,0,maybe,"),
    ):
        before, _, after = whole.rpartition(old)
        path.write_text(before + new + after)
        with pytest.raises(MifoError, match=rf"runs\.csv is damaged: line 3, {column}: "):
            read_record(tmp_path)


@pytest.mark.parametrize("content", [b"\xff", b"- a", b"a:\t- b", b"a: &x [1]\nb: *x", b"", b"title: ['${'"])
def test_a_damaged_table_is_one_sentence_that_names_it(folder, content):
    Path("small/table.yaml").write_bytes(content)
    with pytest.raises(MifoError, match=r"small/table\.yaml"):
        read_table(Path("small"), [])
