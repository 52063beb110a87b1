"""Triton's kernels on the processor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_in_interpreter(code: str) -> None:
    """Run Python code, which may import the tests, in a process whose kernels are interpreted.

    Triton decides so when it is imported. The test is skipped without Triton.
    """
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent)
    assert not done.returncode, done.stderr + done.stdout
