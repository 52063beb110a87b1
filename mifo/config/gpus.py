"""One job per GPU on one host, for launchers that do not share out GPUs themselves."""

import fcntl
import os
import subprocess
import tempfile
from itertools import takewhile
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from mifo.errors import MifoError

_claim: int | None = None  # file descriptor of the lock, which is held as long as the process lives


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them; does not initialise CUDA."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        named = [name.strip() for name in chosen.split(",") if name.strip()]
        return [*takewhile(lambda name: not name.startswith("-"), named)]  # as CUDA reads it
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    return [str(number) for number in range(len(listed.stdout.splitlines()))] if not listed.returncode else []


def claim_if_asked(exclusive: bool) -> None:
    """`claim_gpu` for a job that asks for a GPU of its own, itself or by `hydra/launcher=gpus`."""
    if exclusive or HydraConfig.get().runtime.choices["hydra/launcher"] == "gpus":
        claim_gpu()


def claim_gpu() -> None:
    """Take a GPU that no other job of this user has claimed on this host, for as long as this process lives.

    It must happen before CUDA is initialised. A process that runs several jobs keeps its GPU; without GPUs
    nothing happens.

    Raises:
        MifoError: all are taken.
    """
    global _claim
    gpus = visible_gpus()
    if _claim is not None or not gpus:
        return
    for gpu in gpus:
        path = Path(tempfile.gettempdir()) / f"mifo-{os.getuid()}-gpu-{gpu}.lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        _claim = lock
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        return
    raise MifoError(f"all {len(gpus)} GPUs have a job; let the launcher start no more jobs than GPUs at once")
