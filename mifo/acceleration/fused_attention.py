"""PyTorch's fused attention, by the kernel that starts or runs fastest."""

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel

_READY_MADE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_LONG = 1024  # queries and keys from which on cuDNN's kernel earns the time that it takes to be built


def quick_to_start(length: int = 0) -> AbstractContextManager[None]:
    """Fused attention within the `with` block, by cuDNN first where sequences have a great `length`.

    cuDNN builds a kernel for each new shape, forward and backward, which takes it a quarter of a second.
    """
    backends = [SDPBackend.CUDNN_ATTENTION, *_READY_MADE] if length >= _LONG else _READY_MADE
    return sdpa_kernel(backends, set_priority=True)
