"""Root-mean-square norms of diffusers and transformers, computed by PyTorch's fused function."""

from collections.abc import Callable

from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


def fuse_rms_norms(network: nn.Module) -> None:
    """Have the norms of a network become instances of subclasses of their classes, in place.

    The libraries' own take seven operations, and in 16 bits they round twice where PyTorch rounds once.
    """
    for module in network.modules():
        if type(module) is RMSNorm and module.weight is not None and module.bias is None:
            module.__class__ = _RMSNorm
        elif type(module) is Qwen3RMSNorm:
            module.__class__ = _Qwen3RMSNorm


class _RMSNorm(RMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return _normed(hidden_states, self.weight, self.eps, super().forward)


class _Qwen3RMSNorm(Qwen3RMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return _normed(hidden_states, self.weight, self.variance_epsilon, super().forward)


def _normed(states: Tensor, weight: Tensor, eps: float, own: Callable[[Tensor], Tensor]) -> Tensor:
    """Normed by the fused function, which takes one precision, or by the library's `own`."""
    return F.rms_norm(states, weight.shape, weight, eps) if states.dtype is weight.dtype else own(states)
