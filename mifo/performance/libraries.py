"""cuDNN, cuBLAS and Triton loaded ahead of their first use."""

import logging
from threading import Thread

import torch
from torch.nn import functional as F

from mifo.performance.kernels import has_kernels

log = logging.getLogger(__name__)


def load_libraries(device: torch.device) -> None:
    """Begin to load what the first convolution and the first product on a GPU would wait a second for.

    It goes on in a thread, beside the reading of weights. Without a GPU nothing happens.
    """
    if device.type == "cuda":
        Thread(target=_use, args=(device,), daemon=True).start()


def _use(device: torch.device) -> None:
    try:
        with torch.no_grad():
            # as wide as those of the networks: a narrow one has kernels of its own
            x = torch.zeros(2, 128, 64, 64, dtype=torch.bfloat16, device=device)
            x = x.to(memory_format=torch.channels_last)
            F.conv2d(x, x.new_zeros(128, 128, 3, 3).to(memory_format=torch.channels_last), padding=1)
            F.linear(x.permute(0, 2, 3, 1), x.new_zeros(128, 128))
            torch.cuda.synchronize(device)
        has_kernels(device)  # imports Triton
    except RuntimeError as error:  # whoever needs them next will say so
        log.debug("Libraries of the GPU were not loaded ahead: %s", error)
