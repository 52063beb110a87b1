"""A small sweep by each launcher, for real: what the jobs make is what a serial sweep makes."""

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from tiny import tiny_pipeline

pytestmark = pytest.mark.slow

LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", ["hydra.launcher.timeout_min=5"]),
    "ray": ("hydra_plugins.hydra_ray_launcher", ["+hydra.launcher.ray.init.num_cpus=2"]),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


# The summary's table wraps at the terminal's width.
WIDE = {**os.environ, "COLUMNS": "200"}


def sweep(source, folder, *extra):
    """Two good jobs and a bad one; returns what each good job learned."""
    command = [
        *(sys.executable, "-m", "mifo", "learn", "-m", "debug=fast_dev_run", "device=cpu", "logger=none"),
        *("callbacks=none", "model=local", f"model.source={source}", "learning.semantic.steps=1,ten,2"),
        *("performance.threads=1", f"hydra.sweep.dir={folder}"),
    ]
    done = subprocess.run(
        [*command, *extra], cwd=folder.parent, env=WIDE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed" in done.stdout and "Value 'ten'" in done.stdout
    return [load_file(folder / job / "learned" / "tokens.safetensors")["rows"] for job in ("0", "2")]


@pytest.fixture(scope="module")
def serial(source, tmp_path_factory):
    return sweep(source, tmp_path_factory.mktemp("serial") / "sweep")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_makes_what_a_serial_sweep_makes(launcher, source, serial, tmp_path):
    plugin, options = LAUNCHERS[launcher]
    pytest.importorskip(plugin)
    made = sweep(source, tmp_path / "sweep", f"hydra/launcher={launcher}", *options)
    assert all(rows.equal(expected) for rows, expected in zip(made, serial, strict=True))


@pytest.mark.parametrize(
    ("search", "trials"), [("loss_weights", "best_value"), ("editability_and_consistency", "solutions")]
)
def test_optuna_searches(search, trials, source, tmp_path):
    pytest.importorskip("optuna")
    command = [
        *(sys.executable, "-m", "mifo", "run", "-m", f"hparams_search={search}", "debug=fast_dev_run"),
        *("device=cpu", "logger=none", "callbacks=none", "model=local", f"model.source={source}"),
        *("metrics=miniature", "metrics.windows=2", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=sweep"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    assert trials in found and "penalty.semantic.weight" in found
    assert (tmp_path / "sweep" / "1" / "scores.json").is_file()
