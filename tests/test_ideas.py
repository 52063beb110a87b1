"""What an idea gains is measured by doing without it: that changes the time, not the result."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from test_learning import TRAINER, Watch
from test_synthesis import QUICK, run, subjects_of
from tiny import two_instances

from mifo.acceleration.settings import PerformanceSettings
from mifo.backbones.loading import load_model
from mifo.backbones.settings import ModelSettings
from mifo.benchmark import ideas as module
from mifo.benchmark.ideas import IDEAS, MEASURES, ideas
from mifo.benchmark.measuring import measured
from mifo.benchmark.records import Circumstances, write_record, write_table
from mifo.benchmark.rows import Bench
from mifo.benchmark.settings import BenchmarkSettings
from mifo.data.learning_data import LearningData
from mifo.errors import MifoError
from mifo.method.losses.settings import PenaltySettings
from mifo.training.fit import learn
from mifo.training.settings import LearningSettings, PriorSettings, StageSettings

PLAIN = PerformanceSettings(learning_precision="float32", synthesis_precision="float32")
# a descent in great steps lets the least difference grow on random weights
GENTLE = replace(QUICK, step_size_start=0.5, step_size_end=0.5)
UNDONE = [idea for idea in IDEAS if idea.undo is not nullcontext]
NEEDS_A_GPU = ["guidance as one graph"]
IN_PICTURES = [idea for idea in UNDONE if "picture" in idea.rows and idea.name not in NEEDS_A_GPU]
IN_LEARNING = [idea for idea in UNDONE if idea.rows != ("picture",)]


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return str(tmp_path_factory.mktemp("prior"))


def losses(source, folder, prior, performance):
    """Of three steps of each stage."""
    settings = LearningSettings(
        semantic=StageSettings(steps=3, checkpoint_every=0),
        finetuning=StageSettings(steps=3, learn="full", learning_rate=1e-3, checkpoint_every=0),
        prior=PriorSettings(pictures=2, steps=2, cache=prior),
    )
    watch, model = Watch(), load_model(ModelSettings("tiny", source))
    penalty = PenaltySettings(warmup_steps=1, timestep_limit=1000)
    options = {"trainer": TRAINER, "callbacks": [watch], "performance": performance}
    learn(model, two_instances(), settings, penalty, folder, **options)
    return [loss for _, _, loss in watch.losses]


@pytest.fixture(scope="module")
def plain(source, prior, tmp_path_factory):
    return losses(source, tmp_path_factory.mktemp("plain"), prior, PLAIN)


@pytest.mark.parametrize("idea", IN_LEARNING, ids=lambda idea: idea.name)
def test_without_an_idea_learning_is_the_same(idea, source, plain, tmp_path, prior, recordings):
    settings = replace(PLAIN, cuda_graphs=bool(idea.graphs), **idea.where)
    with idea.undo():
        assert losses(source, tmp_path, prior, settings) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("idea", IN_PICTURES, ids=lambda idea: idea.name)
def test_without_an_idea_pictures_are_the_same(idea, vectors, vector_unet, recordings):
    v = vectors("synthesis_two_boxes")
    plain = run(vector_unet, v, subjects_of(v), GENTLE)
    unguided = run(vector_unet, v, subjects_of(v), replace(GENTLE, guided_steps=0))
    with idea.undo():
        alone = run(vector_unet, v, subjects_of(v), GENTLE, graphs=bool(idea.graphs))
    # processors round differently, and random weights let it grow; what guidance does is far more
    assert (alone - plain).norm() < 0.01 * (unguided - plain).norm()


@pytest.mark.parametrize(
    ("name", "rows", "to_the_end"),
    [(None, 1, False), ("guidance on the conditional half", 2, False), ("guidance ended early", 1, True)],
)
def test_guidance_passes_without_their_ideas_take_more(name, rows, to_the_end, vectors, vector_unet):
    v = vectors("synthesis_two_boxes")
    idea = next((idea for idea in IDEAS if idea.name == name), None)
    begun, ended = [], []
    count = len(v["initial_latents"])
    hooks = [
        vector_unet.conv_in.register_forward_hook(lambda m, x, y: begun.append(len(y))),
        vector_unet.conv_out.register_forward_hook(lambda m, x, y: ended.append(len(y))),
    ]
    with idea.undo() if idea else nullcontext():
        run(vector_unet, v, subjects_of(v))
    for hook in hooks:
        hook.remove()
    # 2 iterations before each of 2 steps, 5 denoising passes
    assert sorted(begun) == sorted([rows * count] * 4 + [2 * count] * 5)
    assert len(ended) == (9 if to_the_end else 5)


def test_what_is_undone_comes_back():
    before = LearningData.draw
    with next(idea for idea in IDEAS if idea.name == "latents encoded once").undo():
        assert LearningData.draw is not before
    assert LearningData.draw is before


def bench(**settings):
    return Bench(BenchmarkSettings(**settings), PLAIN, torch.device("cpu"), "float32", LearningSettings())


def test_a_row_is_measured_with_all_ideas_before_and_after_the_others(monkeypatch, tmp_path):
    def step(bench):
        undone = LearningData.draw.__module__ != LearningData.__module__
        return measured([0.5 if undone else 0.2], 3.0 if undone else 1.0)

    def picture(bench):
        raise RuntimeError("out of memory\nlong story")

    monkeypatch.setattr(module, "MEASURES", {"stage1_step": step, "picture": picture})
    wanted = ["latents encoded once", "masks once", "graphs kept", "GEGLU's kernels"]
    rows = dict(ideas(bench(ideas=wanted)))
    # without graphs and in another layout the last two have no effect
    assert list(rows) == [
        "stage1_step with all ideas",
        "stage1_step without latents encoded once",
        "stage1_step with all ideas, again",
        "picture with all ideas",
        "picture without masks once",
        "picture with all ideas, again",
    ]
    taken = Circumstances("GPU", "default", "sd21", "2026-11-01", "c0ffee", {"torch": "2", "cuda": "13"})
    write_record(tmp_path / "a.json", taken, rows)
    table = write_table(tmp_path).read_text()
    assert (
        "| latents encoded once | stage1_step | default | 200.0 ms / 200.0 ms | 500.0 ms | +300.0 ms" in table
    )
    assert "| +2.0 GiB | c0ffee, 2026-11-01 |" in table
    assert "| masks once | picture | default | – | out of memory | – | – |" in table


def test_an_unknown_idea_is_refused():
    with pytest.raises(MifoError, match=r"benchmark\.ideas names 'magic'"):
        list(ideas(bench(ideas=["magic"])))


def test_ideas_are_told_apart_and_measured_by_rows_that_there_are():
    assert len({idea.name for idea in IDEAS}) == len(IDEAS)
    assert {row for idea in IDEAS for row in idea.rows} == MEASURES.keys()
