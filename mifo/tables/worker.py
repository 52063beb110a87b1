"""Processes that make one run after the other, so that runs do not wait for Python and PyTorch to start."""

import gc
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

LOG = "log.txt"


class Worker:
    """A process that sees one GPU alone, started at its first run and again after it has died.

    When the process that started it dies, it ends with the run it is making.
    """

    def __init__(self, gpu: str | None, threads: int) -> None:
        self._environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if gpu is not None:
            self._environment["CUDA_VISIBLE_DEVICES"] = gpu
        self._process: subprocess.Popen | None = None
        self._stopped = False
        self._guard = threading.Lock()

    def make(self, *job: object) -> int | None:
        """Have `mifo.tables.execute.make_here(*job)` done; returns the exit code if the process died of it.

        The first of the job's arguments is the folder of the run; what it says goes to `log.txt` there.
        """
        with self._guard:
            if self._stopped:
                return None
            if self._process is None or self._process.poll() is not None:
                command = [sys.executable, "-m", "mifo.tables.worker"]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environment
                )
        try:
            pickle.dump(job, self._process.stdin)
            self._process.stdin.flush()
            answered = self._process.stdout.read(1)
        except BrokenPipeError:
            answered = b""
        return None if answered or self._stopped else self._process.wait()

    def close(self) -> None:
        """End the process after its last run."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()

    def stop(self) -> None:
        """End the process now."""
        with self._guard:
            self._stopped = True
            if self._process is not None:
                self._process.terminate()


def _serve() -> None:
    """Make the runs that arrive on standard input; answer each by a byte on what was standard output."""
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that an import prints is taken for an answer
    import torch

    from mifo.tables.execute import make_here

    while True:
        try:
            job = pickle.load(jobs)
        except EOFError:
            return
        folder: Path = job[0]
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)
        make_here(*job)
        sys.stdout.flush()
        sys.stderr.flush()
        # Lightning's objects refer to each other, so that a run's weights would linger
        gc.collect()
        torch.cuda.empty_cache()
        answers.write(b".")
        answers.flush()


if __name__ == "__main__":
    _serve()
