"""Frozen weights kept in 8 bits, half the memory of bfloat16, and made whole for each product."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STORED = torch.float8_e4m3fn


class Float8Linear(nn.Linear):
    """A linear layer whose weight is `weight` · `scale`: numbers of 8 bits, a factor (out, 1) for each row.

    Products are made in the precision of the input. The whole weight is kept for the gradient, so that
    memory is saved only where a pass keeps little, as with gradient checkpointing.
    """

    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        weight = layer.weight.detach()
        most = torch.finfo(STORED).max
        scale = weight.abs().amax(1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / most
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((weight / scale).to(STORED), requires_grad=False)
        self.bias = layer.bias

    def forward(self, states: Tensor) -> Tensor:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        return F.linear(states, self.weight.to(dtype) * self.scale.to(dtype), self.bias)


def keep_in_float8(network: nn.Module) -> None:
    """Keep the linear layers of a network's lists of blocks so, in place; they must not learn."""
    for blocks in [each for each in network.modules() if isinstance(each, nn.ModuleList)]:
        # paths alone: a list of layers would keep all whole weights in memory to its end
        for path in [path for path, each in blocks.named_modules() if type(each) is nn.Linear]:
            layer: Any = blocks.get_submodule(path)
            blocks.set_submodule(path, Float8Linear(layer))
