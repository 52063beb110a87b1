"""One job per GPU: a claimed GPU is left alone."""

import fcntl
import os
import subprocess
from contextlib import contextmanager

import pytest

from mifo.config import gpus
from mifo.errors import MifoError


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(gpus, "_claim", None)
    monkeypatch.setattr(gpus.tempfile, "gettempdir", lambda: str(tmp_path))
    yield tmp_path
    if gpus._claim is not None:
        os.close(gpus._claim)


@contextmanager
def taken(folder, gpu):
    """The lock of another job."""
    with open(folder / f"mifo-{os.getuid()}-gpu-{gpu}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_job_takes_the_first_free_gpu_and_keeps_it(fresh, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    with taken(fresh, 4):
        gpus.claim_gpu()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
        gpus.claim_gpu()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


def test_more_jobs_than_gpus_are_refused(fresh, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with taken(fresh, 0), pytest.raises(MifoError, match="all 1 GPUs"):
        gpus.claim_gpu()
    gpus.claim_gpu()  # free again


def test_gpus_are_counted_without_cuda(monkeypatch):
    listing = "GPU 0: H100 (UUID: GPU-1)\nGPU 1: H100 (UUID: GPU-2)\n"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    done = subprocess.CompletedProcess([], 0, stdout=listing)
    monkeypatch.setattr(gpus.subprocess, "run", lambda *_, **__: done)
    assert gpus.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.visible_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,-1,0")
    assert gpus.visible_gpus() == ["1"]
