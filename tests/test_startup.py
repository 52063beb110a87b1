"""Help, the composed configuration and drawn layouts start at once: they import no library of learning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LEARNING = {"torch", "diffusers", "transformers", "lightning", "torchmetrics", "wandb"}
ARRAYS = {"numpy", "scipy", "pandas", "matplotlib"}

PROGRAM = """
import atexit, pathlib, sys
atexit.register(lambda: pathlib.Path("imported").write_text(" ".join(sys.modules)))
from mifo.cli import main
sys.argv[0] = "mifo"
main()
"""


@pytest.mark.parametrize(
    "command, avoided",
    [
        (["--help"], LEARNING | ARRAYS | {"hydra", "omegaconf", "PIL"}),
        (["run", "--help"], LEARNING | ARRAYS),
        (["table", "--help"], LEARNING | ARRAYS),
        (["learn", "--cfg", "job"], LEARNING | ARRAYS),
        (["layout", "hydra.run.dir=drawn"], LEARNING | ARRAYS),
    ],
)
def test_light_commands_import_no_heavy_library(tmp_path, command, avoided):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    imported = {name.split(".")[0] for name in (tmp_path / "imported").read_text().split()}
    assert "mifo" in imported
    assert not imported & avoided
