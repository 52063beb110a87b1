"""What a GPU loads at its first use, loaded ahead: kernels of PyTorch, cuDNN, cuBLAS and Triton."""

import logging
from threading import Thread

import torch

log = logging.getLogger(__name__)


def load_libraries(device: torch.device) -> None:
    """Begin to load what learning would wait two seconds for at its first steps on a GPU.

    It goes on in a thread, beside the reading of weights. Without a GPU nothing happens.
    """
    if device.type == "cuda":
        Thread(target=_load, args=(device,), daemon=True).start()


def _load(device: torch.device) -> None:
    # diffusers' networks, for which tasks without a model need not wait
    from mifo.acceleration.rehearsal import rehearse

    try:
        # a stream of its own, for another thread may capture a graph meanwhile
        with torch.cuda.stream(torch.cuda.Stream(device)):
            rehearse(device)
            torch.cuda.current_stream(device).synchronize()
    except RuntimeError as error:  # whoever needs them next will say so
        log.debug("Libraries of the GPU were not loaded ahead: %s", error)
