"""The speedrun: its clock stands while pictures are judged, it stops at the target, and its rows add up."""

from threading import Event, Thread

import pandas as pd
import pytest

from mifo.backbones.loading import load_model
from mifo.callbacks import speedrun as stopwatch
from mifo.commands.speedrun import alone, speedrun
from mifo.config.compose import compose, settings_of
from mifo.errors import MifoError
from mifo.metrics.evaluation import Evaluation, PictureEvaluator
from mifo.metrics.scores import Evaluator, Score

SMALL = [
    "debug=default",
    "device=cpu",
    "learning.semantic.steps=2",
    "every=1",
    "layout.endings=[in the snow]",
]


class Judge:
    """Finds the k-th pictures better than those before, after 100 seconds of its own."""

    def __init__(self, clock):
        self.clock, self.seen = clock, 0

    def evaluate(self, pictures, instances):
        self.seen += 1
        self.clock.now += 100
        by = Evaluator("judge", "0" * 12)
        good = 0.3 * self.seen
        scores = (
            Score("identification", good, True, by, "test"),
            Score("leakage", 1 - good, False, by, "test"),
        )
        return Evaluation(scores, ())


class Clock:
    """Each reading takes a second."""

    now = 0.0

    def perf_counter(self):
        self.now += 1
        return self.now


@pytest.fixture
def judged(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    monkeypatch.setattr(PictureEvaluator, "from_settings", lambda *_: Judge(clock))

    def run(name, *overrides):
        return speedrun(
            settings_of(compose("speedrun", [*SMALL, *overrides, f"paths.output={tmp_path / name}"]))
        )

    return run


def test_learning_stops_at_the_target_and_a_row_is_added(judged):
    board = judged("one", "identification=0.5", "leakage=0.5", "leaderboard=board.csv")
    judged("two", "identification=0.85", "leakage=0.2", "leaderboard=board.csv", "seed=3")
    rows = pd.read_csv(board)
    assert rows["stage"].tolist() == ["semantic", "finetuning"] and rows["step"].tolist() == [2, 1]
    assert rows["identification"].tolist() == pytest.approx([0.6, 0.9])
    # one second to each look, without the judge's 100, and one from the end of the last
    assert rows["seconds"].tolist() == [2, 3] and rows["seed"].tolist() == [0, 3]
    assert {"date", "commit", "device", "overrides"} <= {*rows} and "seed=3" in rows["overrides"][1]


def test_what_an_earlier_speedrun_made_is_not_left_out_of_the_time(judged, tmp_path):
    given = "one", "identification=0.5", "leakage=0.5", "leaderboard=board.csv", "learning.prior.cache=made"
    judged(*given)
    assert not (tmp_path / "one" / "checkpoints").exists()
    (tmp_path / "made").mkdir(exist_ok=True)
    with pytest.raises(MifoError, match="made exists already"):
        judged(*given)
    with pytest.raises(MifoError, match=r"learning\.prior\.cache=null.*leave it out"):
        judged("two", "learning.prior.cache=null")
    assert len(pd.read_csv(tmp_path / "board.csv")) == 1


def test_a_target_that_is_not_reached_leaves_no_row(judged, tmp_path):
    with pytest.raises(MifoError, match=r"not reached; the best was identification 1\.200"):
        judged("run", "identification=1.3", "leaderboard=board.csv")
    assert not (tmp_path / "board.csv").exists()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: text[: len(text) // 2], "board.csv is damaged: a row has more or fewer fields"),
        (
            lambda text: text.replace("seconds", "minutes"),
            "board.csv is damaged: it lacks the column seconds",
        ),
        (
            lambda text: text.replace("0.6000,", "nan,"),
            "board.csv is damaged: line 2, identification",
        ),
        (lambda text: "", "board.csv is damaged: it is no table"),
    ],
)
def test_a_damaged_leaderboard_is_refused_before_anything_is_learned(judged, monkeypatch, damage, told):
    board = judged("one", "identification=0.5", "leakage=0.5", "leaderboard=board.csv")
    board.write_text(damage(board.read_text()))
    before = board.read_text()
    monkeypatch.setattr("mifo.commands.speedrun.learn", lambda *_, **__: pytest.fail("it has learned"))
    with pytest.raises(MifoError, match=told):
        judged("two", "leaderboard=board.csv")
    assert board.read_text() == before


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("every=0", "at least 1"),
        ("metrics=none", "needs metrics"),
        ("instances=one_car", "two"),
        ("layout=plain", "take a layout that has boxes"),
    ],
)
def test_what_cannot_be_judged_is_refused(judged, override, told):
    layout = ["layout=benchmark_one"] if "one_car" in override else []
    with pytest.raises(MifoError, match=told):
        judged("run", override, *layout)


def test_rows_that_others_add_meanwhile_are_kept(judged, tmp_path, monkeypatch):
    target = ["identification=0.5", "leakage=0.5", "leaderboard=board.csv"]
    judged("one", *target)
    before = (tmp_path / "board.csv").read_text()
    (tmp_path / "board.csv").unlink()

    def meanwhile(model, device):
        (tmp_path / "board.csv").write_text(before)
        return load_model(model, device)

    monkeypatch.setattr("mifo.commands.speedrun.load_model", meanwhile)
    judged("two", *target, "seed=3")
    assert pd.read_csv(tmp_path / "board.csv")["seed"].tolist() == [0, 3]


def test_two_speedruns_write_the_leaderboard_one_after_the_other(tmp_path):
    told, inside = [], Event()

    def second():
        inside.wait()
        with alone(tmp_path / "board.csv"):
            told.append("second")

    other = Thread(target=second, daemon=True)
    other.start()
    with alone(tmp_path / "board.csv"):
        inside.set()
        other.join(0.2)
        told.append("first")
    other.join()
    assert told == ["first", "second"]
