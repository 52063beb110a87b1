"""A small share of the harnesses in `scripts/`, which are run whole by hand."""

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
