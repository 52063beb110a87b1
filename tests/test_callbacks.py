"""Callbacks in a short real run: what they log is true, and they leave learning as it is."""

import csv
import logging

import pytest
import torch
import wandb
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from terms import penalty
from tiny import MeanColour, two_instances

from mifo.backbones.loading import load_model
from mifo.backbones.settings import ModelSettings
from mifo.callbacks.announce import Announce, ranges
from mifo.callbacks.attention_maps import AttentionMaps, attention_in_mask
from mifo.callbacks.evaluation import EvaluatePictures
from mifo.callbacks.mechanism import Mechanism
from mifo.callbacks.progress import StageProgress
from mifo.callbacks.samples import SamplePictures
from mifo.callbacks.statistics import LearningStatistics
from mifo.callbacks.tokens import TokenStatistics
from mifo.data.layouts import LayoutSettings
from mifo.data.saved_pictures import Picture
from mifo.data.settings import PriorSettings
from mifo.metrics.evaluation import PictureEvaluator
from mifo.metrics.settings import MetricsSettings
from mifo.training.fit import learn
from mifo.training.settings import LearningSettings, StageSettings, constant

BOXES = LayoutSettings(arrange="row")


def paint(model, wanted):
    """A stand-in for synthesis that uses up random numbers and demands a model that does not learn."""
    assert not model.unet.training and not model.text_encoder.training
    torch.rand(7)
    return [Picture(torch.full((3, 32, 32), 0.5), each.prompt, each.boxes, 0) for each in wanted]


@pytest.fixture
def run(source, tmp_path):
    """Learn for a few steps; returns the folder and the new rows."""
    instances = two_instances()
    settings = LearningSettings(
        semantic=StageSettings(steps=4, checkpoint_every=0),
        finetuning=StageSettings(steps=2, trainable="full", lr_scheduler=constant(), checkpoint_every=0),
        prior=PriorSettings(weight=0),
    )

    def start(name, *callbacks, loggers=(), losses=None):
        model = load_model(ModelSettings("tiny", source))
        trainer = {
            "accelerator": "cpu",
            "log_every_n_steps": 2,
            "enable_progress_bar": any(isinstance(each, StageProgress) for each in callbacks),
        }
        learn(
            model,
            instances,
            settings,
            penalty(reward_steps=2) if losses is None else losses,
            tmp_path / name,
            trainer=trainer,
            callbacks=callbacks,
            loggers=loggers,
        )
        return tmp_path / name, model.new_rows["text_encoder"].detach()

    return start


def read_csv(folder):
    """The logged values, by name, as lists of (step, value)."""
    with open(folder / "csv" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return {
        key: [(int(row["step"]), float(row[key])) for row in rows if row[key]]
        for key in rows[0]
        if key not in ("step", "epoch")
    }


def test_the_mechanism_is_measured_on_the_same_draws_and_changes_nothing(run, tmp_path):
    class Beside(Mechanism):
        """Adds up what the losses say by themselves."""

        seen = ()

        def _losses(self, trainer, module):
            for batch, parts in super()._losses(trainer, module):
                learning = [each for each in module.parameters() if each.requires_grad]
                gradients = torch.autograd.grad(parts.total, learning, retain_graph=True, allow_unused=True)
                total = sum(each.square().sum() for each in gradients if each is not None).sqrt()
                self.seen += ((trainer.global_step, batch.inputs.noise.sum().item(), total.item()),)
                yield batch, parts

    logger = CSVLogger(tmp_path, name="csv", version="")
    beside = Beside(every=2, draws=3)
    _, rows = run("with", beside, loggers=[logger])
    _, plain = run("without")
    assert torch.equal(rows, plain)
    found = read_csv(tmp_path)
    for stage, steps in (("semantic", [2, 4]), ("finetuning", [2])):
        shares = [found[f"{stage}/mechanism/{name}"] for name in ("own", "others", "elsewhere")]
        assert [step for step, _ in shares[0]] == steps
        for each in zip(*shares, strict=True):
            assert sum(value for _, value in each) == pytest.approx(1, abs=1e-5)
            assert all(0 <= value <= 1 for _, value in each)
        assert all(value == 0 for _, value in found[f"{stage}/mechanism/prior"])  # there is none here
        assert all(value > 0 for _, value in found[f"{stage}/mechanism/denoising"])
    noises = [noise for _, noise, _ in beside.seen]
    assert noises[:3] == noises[3:6] and len(set(noises[:3])) == 3
    # where no term reads attention, it is read nevertheless, and nothing pulls at it
    logger = CSVLogger(tmp_path, name="none", version="")
    run("none", Mechanism(every=2, draws=1), loggers=[logger], losses=penalty("none"))
    with open(tmp_path / "none" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("semantic/mechanism/own")]
    assert [float(row["semantic/mechanism/attention"]) for row in rows] == [0, 0]
    assert all(0 < float(row["semantic/mechanism/own"]) < 1 for row in rows)
    # no part pulls harder than all of them do, and they together not harder than their sum
    total = sum(norm for *_, norm in beside.seen[:3]) / 3
    parts = [found[f"semantic/mechanism/{name}"][0][1] for name in ("denoising", "attention")]
    assert abs(parts[0] - parts[1]) - 1e-6 <= total <= sum(parts) + 1e-6


class Watch(Callback):
    """Takes its own measure of what the callbacks log."""

    def __init__(self):
        self.rows, self.norms = {}, {}

    def on_fit_start(self, trainer, module):
        self.rows[module.stage, 0] = module.model.new_rows["text_encoder"].detach().clone()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [each.grad.flatten() for each in module.parameters() if each.grad is not None]
        self.norms[module.stage, trainer.global_step + 1] = torch.cat(gradients).norm().item()

    def on_train_batch_end(self, trainer, module, *args):
        self.rows[module.stage, trainer.global_step] = module.model.new_rows["text_encoder"].detach().clone()


def test_statistics_are_those_of_the_run(run, tmp_path):
    watch = Watch()
    logger = CSVLogger(tmp_path / "run", "csv", "")
    folder, _ = run("run", watch, LearningStatistics(), TokenStatistics(), loggers=[logger])
    values = read_csv(folder)
    for stage, last in (("semantic", 4), ("finetuning", 2)):
        logged = dict(values[f"{stage}/gradient_norm"])
        assert list(logged.values())[-1] == pytest.approx(watch.norms[stage, last], rel=1e-4)
        start, end = watch.rows[stage, 0][1], watch.rows[stage, last][1]
        assert values[f"{stage}/tokens/norm/<asset1>"][-1][1] == pytest.approx(end.norm().item(), rel=1e-4)
        drift = values[f"{stage}/tokens/drift/<asset1>"][-1][1]
        assert drift == pytest.approx((end - start).norm().item(), rel=1e-3)
        assert values[f"{stage}/steps_per_second"][-1][1] > 0
        assert 0.01 < values[f"{stage}/peak_gib"][-1][1] < 100
    cosine = torch.cosine_similarity(*watch.rows["finetuning", 2], dim=0).item()
    assert values["finetuning/tokens/nearest_pair_cosine"][-1][1] == pytest.approx(cosine, abs=1e-4)


def test_watching_changes_nothing_and_leaves_pictures(run, tmp_path):
    loggers = [
        CSVLogger(tmp_path / "watched", "csv", ""),
        TensorBoardLogger(tmp_path / "watched", "board", ""),
    ]
    evaluate = EvaluatePictures(paint, BOXES, MetricsSettings(), every=2)
    evaluate._evaluator = PictureEvaluator(MeanColour(), MeanColour(), MetricsSettings(windows=2))
    folder, watched = run("watched", AttentionMaps(every=2), evaluate, StageProgress(), loggers=loggers)
    _, plain = run("plain")
    torch.testing.assert_close(watched, plain, rtol=0, atol=0)
    for name in ("attention_maps", "samples", "leakage"):
        files = sorted(path.name for path in (folder / "learning" / name).iterdir())
        assert files == ["finetuning-000002.png", "semantic-000002.png", "semantic-000004.png"]
        Image.open(folder / "learning" / name / files[0]).verify()
    values = read_csv(folder)
    assert [step for step, _ in values["semantic/scores/leakage"]] == [2, 4]
    share = values["semantic/attention_in_mask/<asset0>"][-1][1]
    per_layer = [
        series[-1][1]
        for key, series in values.items()
        if key.startswith("semantic/attention_in_mask/<asset0>/")
    ]
    assert len(per_layer) > 1 and share == pytest.approx(sum(per_layer) / len(per_layer), abs=1e-5)
    assert any(path.name.startswith("events") for path in (folder / "board").iterdir())


def test_samples_come_at_the_end_whatever_the_interval(run):
    folder, _ = run("run", SamplePictures(paint, BOXES, every=3))
    names = sorted(path.name for path in (folder / "learning" / "samples").iterdir())
    assert names == ["finetuning-000002.png", "semantic-000003.png", "semantic-000004.png"]


def test_the_first_line_says_what_is_active(run, caplog):
    with caplog.at_level(logging.INFO):
        run("run", Announce())
    semantic, finetuning = (
        next(line for line in caplog.messages if line.startswith(f"{stage}:"))
        for stage in ("semantic", "finetuning")
    )
    assert "4 steps; 2 masks; denoising in the masks" in semantic
    assert "reward × 0.01 on cross layers 3–6 in steps 0 to 1" in semantic
    assert "penalty × 0.02 on cross layers 3–6 in steps 2 to 3" in semantic
    assert "at times below 0.5" in semantic and "32 parameters" in semantic
    assert (
        "penalty × 0.02 on cross layers 1, 3–4 at" in finetuning
        and "reward" not in finetuning
        and "(full)" in finetuning
    )


def test_pictures_and_scores_reach_wandb(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")  # what the logger sets is put back
    logger = WandbLogger(save_dir=tmp_path, project="test", offline=True)
    evaluate = EvaluatePictures(paint, BOXES, MetricsSettings(), every=0)
    evaluate._evaluator = PictureEvaluator(MeanColour(), MeanColour(), MetricsSettings(windows=2))
    try:
        run("run", evaluate, loggers=[logger])
        summary = dict(logger.experiment.summary)
    finally:
        wandb.finish()
    assert 0 <= summary["semantic/scores/leakage"] <= 1
    for key in ("semantic/samples", "finetuning/leakage"):
        assert summary[key]["count"] == 1
        stored = summary[key]["filenames"][0]
        assert list(tmp_path.glob(f"wandb/*/files/{stored}"))


def test_layers_are_named_in_runs():
    assert ranges([7, 8, 9, 10, 11, 12]) == "7–12"
    assert ranges([9, 4, 5, 7, 8]) == "4–5, 7–9"
    assert ranges([3]) == "3"


def test_attention_in_mask_is_a_share():
    masks = torch.zeros(2, 8, 8)
    masks[0, :, :4] = 1
    masks[1, :4] = 1
    even = torch.full((2, 4, 4), 0.1)
    assert attention_in_mask(even, masks).tolist() == pytest.approx([0.5, 0.5])
    inside = torch.zeros(2, 4, 4)
    inside[:, 0, 0] = 0.3
    assert attention_in_mask(inside, masks).tolist() == pytest.approx([1, 1])
