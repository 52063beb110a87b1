"""What Weights & Biases is told: offline runs are read back."""

import json
import shutil
from pathlib import Path

import pytest
from offline_wandb import OfflineRun, read_offline_run
from PIL import Image
from tiny import tiny_pipeline

from mifo.training.fit import learn


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return [f"model.source={tiny_pipeline(tmp_path_factory.mktemp('pipeline'))}", "model=local"]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def read(folder: Path) -> OfflineRun:
    (run,) = folder.glob("wandb/offline-run-*")
    return read_offline_run(run)


def test_a_run_is_told_completely(mifo, model, tmp_path):
    given = ["debug=default", "logger=wandb", "method=break_a_scene", "seed=3", "tags=[paper,first]"]
    assert mifo("run", *model, *given, "hydra.run.dir=made") == 0
    told = read(tmp_path / "made")
    assert (
        told.group.startswith("debug=default, method=break_a_scene, model=local, three_cars ")
        and told.job_type == "run"
    )
    assert told.tags == ("paper", "first") and told.exit_code == 0
    assert (
        told.config["seed"] == 3
        and told.config["penalty"]["terms"]["break_a_scene"]["loss"] == "break_a_scene"
    )
    assert told.config["learning"]["finetuning"]["steps"] == 2
    assert told.config["paths"]["output"].endswith("made")
    assert "${" not in json.dumps(told.config)
    assert told.name == "debug=default, method=break_a_scene, model=local, seed 3, three_cars"
    assert told.config["choices"]["penalty"] == "break_a_scene" and told.config["choices"]["layout"] == "row"
    assert "seed=3" in told.config["overrides"] and {"code", "dirty", "sweep", "row"} <= told.config.keys()


def test_scores_pictures_and_what_was_learned_are_there(mifo, model, tmp_path):
    assert mifo("run", *model, "debug=default", "logger=wandb", "hydra.run.dir=made") == 0
    folder = tmp_path / "made"
    told = read(folder)
    scores = json.loads((folder / "scores.json").read_text())
    for score in scores["scores"]:
        name = f"evaluation/{score['metric']}"
        assert told.history[name] == pytest.approx(score["value"])
        assert told.metrics[name] == ("max" if score["higher_is_better"] else "min")
    assert told.metrics["evaluation/leakage"] == "min" and told.metrics["evaluation/editability"] == "max"
    assert "semantic/loss/total" in told.history and "finetuning/loss/total" in told.history

    (stored,) = told.artifacts["run_table"].values()
    table = json.loads(stored["evaluation/pictures.table.json"].read_text())
    assert table["columns"][:4] == ["picture", "prompt", "boxes", "seed"]
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    listed = json.loads((folder / "pictures" / "pictures.json").read_text())[0]
    assert (row["prompt"], row["seed"]) == (listed["prompt"], listed["seed"])
    assert row["boxes"].startswith('{"<asset0>": [0.04, 0.41, 0.32, 0.69]')
    assert row["leakage"] == pytest.approx(scores["pictures"][0]["leakage"])
    shown = Image.open(stored[row["picture"]["path"]])
    assert shown.tobytes() == Image.open(folder / "pictures" / listed["file"]).tobytes()
    (heat_map,) = told.history["evaluation/leakage_matrix/filenames"]
    assert Image.open(told.files / heat_map).width > 100

    ((name, learned),) = told.artifacts["learned"].items()
    assert name == "three_cars-mifo-seed-0"
    assert set(learned) == {path.name for path in (folder / "learned").iterdir()}
    assert learned["tokens.safetensors"].read_bytes() == (folder / "learned/tokens.safetensors").read_bytes()
    assert told.group.replace(", ", "_").replace("=", "_").replace(" ", "_") in told.aliases[name]


def test_each_run_of_a_sweep_is_its_own_also_after_a_failure(mifo, model, tmp_path, monkeypatch):
    def fit(*arguments, seed, **others):
        return learn(*arguments, seed=seed, **others) if seed != 2 else 1 / 0

    monkeypatch.setattr("mifo.commands.learn.fit", fit)
    sweep = ["hydra.sweep.dir=sweep", "seed=1,2,3"]
    assert mifo("learn", "-m", *model, "debug=fast_dev_run", "logger=wandb", *sweep) == 1
    told = [read(tmp_path / "sweep" / str(job)) for job in range(3)]
    assert [run.config["seed"] for run in told] == [1, 2, 3]
    assert [run.exit_code for run in told] == [0, 1, 0]
    (group,) = {run.group for run in told}
    assert group.startswith("debug=fast_dev_run, model=local, three_cars ")
    assert [run.name[:6] for run in told] == ["seed 1", "seed 2", "seed 3"]
    assert {run.config["sweep"] for run in told} == {str(tmp_path / "sweep")}


def test_a_run_that_goes_on_offline_counts_its_steps_on(mifo, model, tmp_path):
    run = ["learn", *model, "debug=fast_dev_run", "logger=wandb", "hydra.run.dir=made"]
    assert mifo(*run) == 0
    shutil.rmtree(tmp_path / "made" / "learned")
    assert mifo("learn", "resume=made") == 0
    parts = [read_offline_run(part) for part in sorted((tmp_path / "made").glob("wandb/offline-run-*"))]
    assert len(parts) == 2 and parts[0].id == parts[1].id and parts[0].id
    assert max(parts[0].steps) < min(step for step in parts[1].steps if step)
