"""Operations that give the same result bit for bit each time, also on a GPU."""

import os

import torch


def compute_repeatably(wanted: bool) -> None:
    """Let this process use only operations that give the same result each time, or any again.

    Without it gradients of attention and of convolutions are summed on a GPU in whatever order comes. Call it
    before the GPU is used: cuBLAS reads its part of it when it starts.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # memory that is not yet written would be filled for it, too, which nothing here reads
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(wanted)
