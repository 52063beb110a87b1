"""The recipes of docs/extending.md, word for word."""

import re
from pathlib import Path

import pytest
import torch
from tiny import MeanColour, instances_of

from mifo.data.saved_pictures import Picture
from mifo.method import losses
from mifo.metrics.evaluation import METRICS, PictureEvaluator
from mifo.metrics.scores import COSINE, RANGES
from mifo.tables.plan import plan
from mifo.tables.settings import read_table

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]


def blocks(title, language):
    return re.findall(rf"^```{language}\n(.*?)^```", section(title), re.DOTALL | re.MULTILINE)


def write(folder, block):
    """Write a block into the file that its first line names."""
    folder.mkdir(exist_ok=True)
    file = folder / re.match(r"# (\S+)\n", block)[1]
    file.write_text(block)
    return file


SHORT = (
    *(
        "model=local",
        "device=cpu",
        "logger=none",
        "callbacks=announce",
        "metrics=none",
        "learning.prior.weight=0",
    ),
    *("learning.semantic.steps=3", "learning.finetuning.steps=0"),
)


def test_a_loss_of_the_house(source, mifo, tmp_path, monkeypatch, capsys):
    write(tmp_path / "losses", *blocks("A loss", "python"))
    monkeypatch.setattr(losses, "__path__", [*losses.__path__, str(tmp_path / "losses")])
    (tmp_path / "conf").mkdir()
    write(tmp_path / "conf" / "penalty", *blocks("A loss", "yaml"))
    place = f"hydra.searchpath=[file://{tmp_path}/conf]"
    assert mifo("learn", f"model.source={source}", *SHORT, place, "penalty=outside") == 0
    told = "".join(capsys.readouterr())
    assert "outside × 0.01 to 0.001" in told


def test_a_loss_of_a_package_of_ones_own(source, mifo, tmp_path, monkeypatch, capsys):
    write(tmp_path, *blocks("A loss", "python")).rename(tmp_path / "my_package.py")
    monkeypatch.syspath_prepend(tmp_path)
    (command,) = blocks("A loss", "sh")
    added = re.search(r"`'(\+penalty.*?)'`", section("A loss"))[1].replace('["16"]', '["8"]')
    assert command.split()[0] == "mifo"
    assert mifo(*command.split()[1:], added, f"model.source={source}", *SHORT, "penalty.reward_steps=1") == 0
    told = "".join(capsys.readouterr())
    assert "penalty × 0.02 on cross layers" in told and "mine × 0.1 on cross layers" in told


def test_a_metric(monkeypatch):
    file, line, bounds = blocks("A metric", "python")
    made = {}
    exec(file, made)
    for name, metric in eval("{" + line + "}", made).items():
        monkeypatch.setitem(METRICS, name, metric)
    for name, bound in eval("{" + bounds + "}", {"COSINE": COSINE}).items():
        monkeypatch.setitem(RANGES, name, bound)
    colours = torch.eye(3)[:, :, None, None].expand(3, 3, 32, 16)
    source = torch.cat([colours[0], colours[1]], dim=2)
    masks = torch.zeros(2, 32, 32)
    masks[0, :, :16], masks[1, :, 16:] = 1, 1
    boxes = {"<asset0>": (0.0, 0.0, 0.5, 1.0), "<asset1>": (0.5, 0.0, 1.0, 1.0)}
    wrong = torch.cat([colours[0], colours[2]], dim=2)
    pictures = [Picture(image, "<asset0> and <asset1>", boxes) for image in (source, wrong)]
    evaluator = PictureEvaluator(MeanColour(), MeanColour())
    found = evaluator.evaluate(pictures, instances_of(source, masks, ("car", "cat")))
    assert [row["worst_instance"] for row in found.pictures] == pytest.approx([1, 0], abs=1e-5)
    (score,) = [score for score in found.scores if score.metric == "worst_instance"]
    assert score.higher_is_better and score.evaluator == MeanColour.evaluator


def test_a_table(tmp_path):
    write(tmp_path, *blocks("A table", "yaml"))
    assert read_table(tmp_path, [])[0].scenes == {"look-alikes": ["alike_*"]}
    settings, overrides = read_table(tmp_path, ["table.scenes={cars: [three_cars]}", "table.seeds=[0]"])
    runs = plan("mine", settings, overrides)
    assert [run.row for run in runs] == ["MIFO", "twice the penalty"]
    weights = {run.settings.penalty.terms["penalty"].weight for run in runs}
    assert weights == {0.02, 0.04} and not [run for run in runs if run.error]
