"""Seconds a run of a table, with processes that share a GPU under NVIDIA's MPS where it can be started.

    python scripts/table_speed.py 32 experiments/learning_settings 'table.seeds=[3]' performance.threads=1

The table is made by so many processes, in an empty folder, with the code of the working folder, so that two
versions can be compared on one machine. What a run takes when all processes are warm is told by the runs that
end after as many as there are processes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def shared_gpu(folder: Path) -> Iterator[bool]:
    """Yields whether the processes that start meanwhile share the GPU under MPS."""
    control = shutil.which("nvidia-cuda-mps-control")
    for key, name in (("CUDA_MPS_PIPE_DIRECTORY", "pipe"), ("CUDA_MPS_LOG_DIRECTORY", "log")):
        (folder / name).mkdir()
        os.environ[key] = str(folder / name)
    served = control is not None and subprocess.run([control, "-d"], check=False).returncode == 0
    try:
        yield served
    finally:
        if served:
            subprocess.run([control], input="quit\n", text=True, check=False)


def main(workers: int, *arguments: str) -> int:
    """Make the table and print its figures; returns the exit code of `mifo table`."""
    folder = Path(tempfile.mkdtemp(prefix="table_speed-"))
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    own = [f"table.workers={workers}", f"table.runs={folder}/runs", f"table.results={folder}/results"]
    with shared_gpu(folder) as served:
        began = time.time()
        command = [sys.executable, "-m", "mifo", "table", *arguments, *own]
        code = subprocess.run(command, check=False).returncode
        wall = time.time() - began
    ended = sorted(path.stat().st_mtime - began for path in (folder / "runs").glob("*/table_run.json"))
    mps = "on" if served else "off"
    print(f"{workers} processes, MPS {mps}, exit code {code}: {len(ended)} runs, {wall:.0f} s")
    if ended:
        print(f"{wall / len(ended):.2f} s a run; the first ended after {ended[0]:.0f} s")
    if len(ended) > workers:
        warm = (ended[-1] - ended[workers - 1]) / (len(ended) - workers)
        print(f"{warm:.2f} s a run when all processes are warm")
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
