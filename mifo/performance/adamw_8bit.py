"""AdamW with moments of 8 bits in plain PyTorch, for any device and without a compiler."""

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 256  # numbers that share a scale
SMALLEST = 4096  # numbers of a parameter below which its moments stay in 32 bits, as in bitsandbytes


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) that keeps both moments as 8-bit codes with a scale for each block.

    Block-wise dynamic quantisation (8-bit optimizers, arXiv 2110.02861): two bytes and 8/256 of a weight
    instead of eight. A step computes in 32 bits, one parameter after the other, and never waits for the
    device. Parameters of fewer than 4096 numbers, or a number that 256 does not divide, keep moments of 32
    bits.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimiser, but codes stay bytes, where PyTorch would give them the weights' precision."""
        super().load_state_dict(state_dict | {"state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, state in state_dict["state"].items():
            device = parameters[index].device
            self.state[parameters[index]] = {
                name: value.to(device, copy=True) if isinstance(value, Tensor) else value
                for name, value in state.items()
            }

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad.float()
        step = state["step"] = state.get("step", 0) + 1
        beta1, beta2 = group["betas"]
        mean = _read(state, "exp_avg", gradient).lerp_(gradient, 1 - beta1)
        square = _read(state, "exp_avg_sq", gradient).mul_(beta2)
        square.addcmul_(gradient, gradient, value=1 - beta2)
        _write(state, "exp_avg", mean)
        _write(state, "exp_avg_sq", square)
        deviation = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(mean / deviation, alpha=-group["lr"] / (1 - beta1**step))


def _read(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    """A moment in 32 bits, at first 0; of a small parameter the state itself."""
    if name not in state:
        return torch.zeros_like(like)
    if f"{name}_scale" not in state:
        return state[name]
    levels, _ = _levels(name, like.device)
    blocks = levels.index_select(0, state[name].flatten().int()).view(-1, BLOCK)
    return blocks.mul_(state[f"{name}_scale"]).view(like.shape)


def _write(state: dict[str, Any], name: str, moment: Tensor) -> None:
    """Keep a moment, as the code of the nearest level in units of its block's largest number."""
    if moment.numel() < SMALLEST or moment.numel() % BLOCK:
        state[name] = moment
        return
    blocks = moment.reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    _, thresholds = _levels(name, moment.device)
    codes = torch.bucketize(blocks / scale, thresholds, out_int32=True)
    state[name], state[f"{name}_scale"] = codes.to(torch.uint8).view(moment.shape), scale


@cache
def _levels(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 levels in [-1, 1], or [0, 1] of the second moment, and the middles between them.

    Dynamic tree quantisation (arXiv 1511.04561): seven powers of ten, each next one with twice the levels,
    0 and 1.
    """
    signed = name == "exp_avg"
    levels = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1)
        decade = 10.0 ** (exponent - 6) * (edges[1:] + edges[:-1]) / 2
        levels += [decade, -decade] if signed else [decade]
    ordered = torch.cat(levels).sort().values
    return ordered.to(device), ((ordered[1:] + ordered[:-1]) / 2).to(device)
