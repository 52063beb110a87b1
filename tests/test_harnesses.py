"""A small share of the scripts in `scripts/` and `experiments/`, which are run whole by hand."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).parents[1] / "scripts"
DESCRIBED = Path(__file__).parents[1] / "experiments" / "text_space" / "described.py"


@pytest.mark.parametrize(
    ("script", "arguments", "counted"),
    [
        ("kill_runs.py", ["--kills", "6", "--full-disks", "6", "--jobs", "2"], "\n0 found"),
        ("fuzz_inputs.py", ["--cases", "45", "--jobs", "2"], "45 cases of 45"),
    ],
)
def test_nothing_is_found(script, arguments, counted):
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert counted in done.stdout


@pytest.mark.parametrize(
    ("scenes", "layout", "wanted"),
    [
        (
            "one_cup,one_car",
            "benchmark_one",
            [["one_cup", "0", "blue cup"], ["one_car", "0", "yellow checked car"]],
        ),
        (
            "mixed-2-apart-0",
            "benchmark",
            [["mixed-2-apart-0", "0", "red checked balloon, orange dotted robot"]],
        ),
    ],
)
def test_words_that_describe_an_instance_are_drawn_and_scored(tmp_path, scenes, layout, wanted):
    few = ["synthesis.steps=2", "guidance.guided_steps=1", "layout.endings=[at the beach, in the snow]"]
    command = [sys.executable, str(DESCRIBED), f"scenes={scenes}", "seeds=0", f"layout={layout}", *few]
    subprocess.run(command, cwd=tmp_path, check=True)
    with (tmp_path / "outputs/described/runs.csv").open(newline="") as file:
        first, *rows = csv.reader(file)
    assert first[:4] == ["instances", "seed", "words", "editability"]
    assert [row[:3] for row in rows] == wanted


def test_two_things_of_one_description_are_refused(tmp_path):
    command = [sys.executable, str(DESCRIBED), "scenes=one_cup,alike-2-hue0-same-apart-0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "alike-2-hue0-same-apart-0 has two things that the same words describe" in done.stderr
    assert not (tmp_path / "outputs").exists()
