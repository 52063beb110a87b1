"""Small sweeps and searches for real: a launcher makes what a serial sweep makes, a search names the best."""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from threading import Event, Thread

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_pipeline

pytestmark = pytest.mark.slow

LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", ["hydra.launcher.timeout_min=5"]),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", ["hydra.launcher.timeout_min=5"]),
    "ray": ("hydra_plugins.hydra_ray_launcher", ["+hydra.launcher.ray.init.num_cpus=2"]),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


# The summary's table wraps at the terminal's width.
WIDE = {**os.environ, "COLUMNS": "200"}


def sweep(source, folder, *extra, **environment):
    """Two good jobs and a bad one; returns what each good job learned."""
    command = [
        *(sys.executable, "-m", "mifo", "learn", "-m", "debug=fast_dev_run", "device=cpu", "logger=none"),
        *("callbacks=none", "model=local", f"model.source={source}", "learning.semantic.steps=1,ten,2"),
        *("performance.threads=1", f"hydra.sweep.dir={folder}"),
    ]
    done = subprocess.run(
        [*command, *extra],
        cwd=folder.parent,
        env={**WIDE, **environment},
        capture_output=True,
        text=True,
        check=False,
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
    if launcher == "submitit_slurm" and shutil.which("sbatch") is None:
        pytest.skip("needs a node of a Slurm cluster")
    made = sweep(source, tmp_path / "sweep", f"hydra/launcher={launcher}", *options)
    assert all(rows.equal(expected) for rows, expected in zip(made, serial, strict=True))


def test_jobs_on_a_ray_cluster_that_runs_already(source, serial, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    import ray

    cluster = ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**27)
    address = cluster.address_info["gcs_address"]
    try:
        chosen = ["hydra/launcher=ray_cluster", f"hydra.launcher.ray.init.address={address}"]
        # Ray turns on its tokens here and, given an address, does not look whether the cluster wants one
        mode = {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}
        made = sweep(source, tmp_path / "sweep", *chosen, **mode)
    finally:
        ray.shutdown()
    assert all(rows.equal(expected) for rows, expected in zip(made, serial, strict=True))


TABLE = """
title: Small
rows: {MIFO: [method=mifo], none: [method=no_attention_loss]}
scenes: {cars: [three_cars]}
seeds: [0, 1]
"""


def made_by_a_table(source, folder, *launcher):
    """What each of four runs learned, drew and scored, by the run's folder."""
    (folder / "small").mkdir(parents=True)
    (folder / "small" / "table.yaml").write_text(TABLE)
    command = [
        *(sys.executable, "-m", "mifo", "table", "small", "debug=fast_dev_run", "device=cpu", "logger=none"),
        *("callbacks=none", "sheet=false", "model=local", f"model.source={source}", "metrics=miniature"),
        *("metrics.windows=2", "performance.threads=1", "table.per_job=2", *launcher),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = list(folder.glob("outputs/runs/*"))
    assert len(runs) == 4 and all((run / "log.txt").is_file() for run in runs)
    return {
        run.name: {
            path.name: path.read_bytes()
            for path in [*run.glob("learned/*.safetensors"), *run.glob("pictures/*.png"), run / "scores.json"]
        }
        for run in runs
    }


@pytest.fixture(scope="module")
def serial_table(source, tmp_path_factory):
    return made_by_a_table(source, tmp_path_factory.mktemp("serial") / "table")


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "submitit_slurm", "ray"])
def test_a_launcher_makes_the_table_that_one_process_makes(launcher, source, serial_table, tmp_path):
    plugin, options = LAUNCHERS[launcher]
    pytest.importorskip(plugin)
    if launcher == "submitit_slurm" and shutil.which("sbatch") is None:
        pytest.skip("needs a node of a Slurm cluster")
    made = made_by_a_table(source, tmp_path / "table", f"hydra/launcher={launcher}", *options)
    assert made == serial_table and all(len(files) > 2 for files in made.values())


ON_TWO_GPUS = {
    "gpus": ("hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": (
        "hydra_plugins.hydra_submitit_launcher",
        ["hydra.launcher.gpus_per_node=2", "exclusive_gpu=true"],
    ),
}


def on_two_gpus(launcher):
    """The choice of a launcher that gives each of two jobs a GPU of its own."""
    plugin, options = ON_TWO_GPUS[launcher]
    pytest.importorskip(plugin)
    return [f"hydra/launcher={launcher}", *options]


@pytest.mark.parametrize("launcher", ON_TWO_GPUS)
def test_each_process_claims_a_gpu_of_its_own(launcher, source, serial, tmp_path):
    """Two GPUs that are not there: what counts is which ones are claimed before CUDA would start."""
    environment = {"CUDA_VISIBLE_DEVICES": "0,1", "TMPDIR": str(tmp_path)}
    # three jobs, the bad one among them, start at once under submitit, which keeps none waiting for a GPU
    third = ["hydra.launcher.gpus_per_node=3"] if launcher == "submitit_local" else []
    made = sweep(source, tmp_path / "sweep", *on_two_gpus(launcher), *third, **environment)
    assert all(rows.equal(expected) for rows, expected in zip(made, serial, strict=True))
    claimed = {path.name.split("-")[-1] for path in tmp_path.glob("mifo-*.lock")}
    assert {"0.lock", "1.lock"} <= claimed


def learnt_on_gpus(folder, *extra):
    """What two jobs learn that differ by their seed."""
    command = [
        *(sys.executable, "-m", "mifo", "learn", "-m", "debug=default", "device=cuda", "seed=1,2"),
        *("logger=none", "callbacks=none", "learning.semantic.steps=200", "performance.deterministic=true"),
        f"hydra.sweep.dir={folder}",
    ]
    done = subprocess.run([*command, *extra], cwd=folder.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [load_file(folder / job / "learned" / "tokens.safetensors")["rows"] for job in "01"]


@pytest.fixture(scope="module")
def serial_on_a_gpu(tmp_path_factory):
    return learnt_on_gpus(tmp_path_factory.mktemp("serial") / "sweep")


@pytest.mark.gpu
@pytest.mark.parametrize("launcher", ON_TWO_GPUS)
def test_two_jobs_at_once_use_two_gpus(launcher, serial_on_a_gpu, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    chosen = on_two_gpus(launcher)
    with GpuWatch() as watch:
        together = learnt_on_gpus(tmp_path / "sweep", *chosen)
    assert len(watch.gpus_of_processes) == 2 and watch.most_gpus_at_once == 2
    assert all(len(gpus) == 1 for gpus in watch.gpus_of_processes.values())
    assert all(rows.equal(expected) for rows, expected in zip(together, serial_on_a_gpu, strict=True))


class GpuWatch:
    """Asks the driver, again and again within a `with` block, which processes compute on which GPU.

    Attributes:
        gpus_of_processes: the GPUs on which each process was seen.
        most_gpus_at_once: how many GPUs had a process at one time.
    """

    def __init__(self):
        self.gpus_of_processes = defaultdict(set)
        self.most_gpus_at_once = 0
        self._ended = Event()
        self._thread = Thread(target=self._watch)

    def _watch(self):
        command = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
        while not self._ended.wait(0.2):
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            seen = [line.split(", ") for line in told.splitlines()]
            self.most_gpus_at_once = max(self.most_gpus_at_once, len({gpu for _, gpu in seen}))
            for process, gpu in seen:
                self.gpus_of_processes[process].add(gpu)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._ended.set()
        self._thread.join()


SEARCHES = {
    "loss_weights": {"leakage": -1},
    "editability_and_consistency": {"editability": 1, "instance_consistency": 1},
}
"""The objectives of each search: 1 for the larger the better."""


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_names_the_trials_that_no_other_beats(search, source, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    command = [
        *(sys.executable, "-m", "mifo", "run", "-m", f"hparams_search={search}", "debug=default"),
        *("device=cpu", "logger=none", "callbacks=none", "model=local", f"model.source={source}"),
        *("metrics=miniature", "metrics.windows=2", "hydra.sweeper.n_trials=3", "hydra.sweep.dir=sweep"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    named = found.get("solutions") or [{"params": found["best_params"], "values": [found["best_value"]]}]
    trials = [read_trial(tmp_path / "sweep" / str(job), list(SEARCHES[search])) for job in range(3)]
    assert len({tuple(trial["params"].values()) for trial in trials}) == 3
    front = [trial for trial in trials if not any(beats(other, trial, search) for other in trials)]
    assert all(trial in front for trial in named)
    assert len(named) == (len(front) if "solutions" in found else 1)


def beats(one, other, search):
    """Whether one trial is nowhere worse than another, and somewhere better."""
    signs = SEARCHES[search].values()
    gains = [
        sign * (mine - theirs)
        for sign, mine, theirs in zip(signs, one["values"], other["values"], strict=True)
    ]
    return min(gains) >= 0 and max(gains) > 0


def read_trial(folder, objectives):
    """The parameters of a job and its scores by those objectives."""
    penalty = yaml.safe_load((folder / "config.yaml").read_text())["penalty"]
    weights = {name: term["weight"] for name, term in penalty["terms"].items()}
    assert weights["finetuning"] == weights["penalty"] and weights["reward"] == penalty["reward_weight"]
    params = {
        "penalty.reward_weight": weights["reward"],
        "penalty.terms.penalty.weight": weights["penalty"],
    }
    scores = {
        each["metric"]: each["value"] for each in json.loads((folder / "scores.json").read_text())["scores"]
    }
    return {"params": params, "values": [scores[name] for name in objectives]}
