"""A small share of the scripts in `scripts/` and `experiments/`, which are run whole by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).parents[1] / "scripts"


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


def test_words_that_describe_an_instance_are_drawn_and_scored(tmp_path):
    script = Path(__file__).parents[1] / "experiments" / "text_space" / "described.py"
    few = ["synthesis.steps=2", "guidance.guided_steps=1", "layout.endings=[at the beach, in the snow]"]
    command = [sys.executable, str(script), "scenes=one_cup,one_car", "seeds=0", *few]
    subprocess.run(command, cwd=tmp_path, check=True)
    rows = (tmp_path / "outputs/described/runs.csv").read_text().splitlines()
    assert rows[0].startswith("instances,seed,words,editability")
    assert [row.split(",")[:3] for row in rows[1:]] == [
        ["one_cup", "0", "blue cup"],
        ["one_car", "0", "yellow checked car"],
    ]
