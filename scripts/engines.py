"""A table of twelve small runs, made in one process, by joblib, on two nodes of a Ray cluster and by Slurm.

    python scripts/engines.py joblib ray slurm

The Ray cluster is started here, with two nodes of one processor each: two jobs at once are on different
nodes. Slurm is started here too, as root, with one node of two processors (package slurm-wlm). What each
engine learns, draws, scores and writes is compared with what one process makes, bit by bit; the exit code is
1 if anything differs. The model is the tests' tiny pipeline with random weights.
"""

import csv
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny import tiny_pipeline

TABLE = """
title: Engines
rows: {MIFO: [method=mifo], no loss on attention: [method=no_attention_loss]}
scenes: {look-alikes: [three_cars, alike_two_cups]}
seeds: [0, 1, 2]
overrides: [model=local, metrics=miniature, metrics.windows=2, device=cpu, performance.threads=1,
  logger=none, callbacks=none, sheet=false, layout=row,
  learning.semantic.steps=3, learning.finetuning.steps=2, learning.prior.weight=0,
  synthesis.samples=1, synthesis.steps=2, guidance.guided_steps=1, guidance.iterations=1]
"""
RUNS = 12
PORT = 6399
SLURM = """
ClusterName=engines
SlurmctldHost={host}
SlurmUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName={host} CPUs=2 State=UNKNOWN
PartitionName=engines Nodes={host} Default=YES State=UP
"""


@contextmanager
def nothing(folder: Path) -> Iterator[list[str]]:
    """One process, one run after the other."""
    yield []


@contextmanager
def joblib(folder: Path) -> Iterator[list[str]]:
    """Two processes of this host."""
    yield ["table.workers=2"]


@contextmanager
def ray(folder: Path) -> Iterator[list[str]]:
    """Two nodes of a cluster, whose tasks are counted by node at the end."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    node = [*_ray("start"), "--num-cpus=1", "--object-store-memory=134217728", "--disable-usage-stats"]
    _quietly([*node, "--head", f"--port={PORT}"])
    try:
        _quietly([*node, f"--address=127.0.0.1:{PORT}"])
        yield ["hydra/launcher=ray_cluster", f"hydra.launcher.ray.init.address=127.0.0.1:{PORT}"]
        from ray.util.state import list_tasks

        nodes = [task.node_id for task in list_tasks(address="http://127.0.0.1:8265") if task.node_id]
        told = ", ".join(f"{nodes.count(node)} jobs on {node[:8]}" for node in sorted({*nodes}))
        print(f"ray: {told}", flush=True)
    finally:
        _quietly([*_ray("stop")])


@contextmanager
def slurm(folder: Path) -> Iterator[list[str]]:
    """One node with the partition `engines`."""
    host = socket.gethostname()
    (folder / "slurm.conf").write_text(SLURM.format(host=host, folder=folder))
    (folder / "state").mkdir()
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    Path("/run/munge").mkdir(exist_ok=True)
    munge = subprocess.Popen(["munged", "--foreground", "--force"], stderr=subprocess.DEVNULL)
    time.sleep(1)
    daemons = [
        subprocess.Popen([name, "-D", "-L", str(folder / f"{name}.log")], stderr=subprocess.DEVNULL)
        for name in ("slurmctld", "slurmd")
    ]
    try:
        while (
            "idle" not in subprocess.run(["sinfo", "-h"], capture_output=True, text=True, check=False).stdout
        ):
            time.sleep(1)
        partition = ["hydra.launcher.partition=engines", "hydra.launcher.timeout_min=30"]
        yield ["hydra/launcher=submitit_slurm", *partition, "hydra.launcher.cpus_per_task=1"]
    finally:
        for daemon in (*daemons, munge):
            daemon.terminate()
            daemon.wait()


def _ray(command: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", command]


def _quietly(command: list[str]) -> None:
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


ENGINES = {"one process": nothing, "joblib": joblib, "ray": ray, "slurm": slurm}


def made(engine: str, folder: Path, source: Path) -> tuple[dict[str, str], float]:
    """The hashes of all that an engine makes, by file, and the seconds that it took."""
    (folder / "engines").mkdir(parents=True)
    (folder / "engines" / "table.yaml").write_text(TABLE)
    places = [
        f"table.runs={folder}/runs",
        f"table.results={folder}/results",
        "table.per_job=3",
        f"model.source={source}",
    ]
    with ENGINES[engine](folder) as launcher:
        began = time.monotonic()
        command = [sys.executable, "-m", "mifo", "table", "engines", *places, *launcher]
        place = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
        with open(folder / "printed.txt", "w") as printed:
            subprocess.run(
                command,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": place},
                stdout=printed,
                stderr=printed,
                check=True,
            )
        seconds = time.monotonic() - began
    kinds = (
        "runs/*/learned/*.safetensors",
        "runs/*/pictures/*.png",
        "runs/*/scores.json",
        "results/table.csv",
    )
    files = [path for kind in kinds for path in folder.glob(kind)]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }, seconds


def main(*engines: str) -> int:
    """Make the tables and compare them; returns 1 if anything differs."""
    place, found = Path(tempfile.mkdtemp(prefix="engines-")), {}
    source = tiny_pipeline(place / "pipeline")
    told = csv.writer(sys.stdout, delimiter="\t")
    told.writerow(["engine", "runs", "files", "unlike one process", "seconds"])
    for engine in ("one process", *engines):
        found[engine], seconds = made(engine, place / engine.replace(" ", "_"), source)
        files = found[engine]
        runs = sum(name.endswith("scores.json") for name in files)
        unlike = dict(files.items() ^ found["one process"].items())
        told.writerow([engine, runs, len(files), len(unlike), f"{seconds:.0f}"])
        sys.stdout.flush()
        if unlike or runs != RUNS:
            print(*sorted(unlike), sep="\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
