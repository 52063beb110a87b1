"""AdamW with moments of 8 bits: in plain PyTorch on any device, as one kernel on a GPU that has Triton.

A step of stage 2 takes 21 % longer and 8.5 GiB more with PyTorch's fused AdamW of 32 bits, and 5.7 times as
long with bitsandbytes' of 8 bits (`experiments/benchmark`).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mifo.acceleration.kernels import BLOCK, has_kernels, own

SMALLEST = 4096  # numbers of a parameter below which its moments stay in 32 bits, as in bitsandbytes
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) that keeps both moments as 8-bit codes with a scale for each block.

    Block-wise dynamic quantisation (8-bit optimizers, arXiv 2110.02861): two bytes and 8/256 of a weight
    instead of eight. A step computes in 32 bits and never waits for the device. Parameters of fewer than 4096
    numbers, or a number that 256 does not divide, keep moments of 32 bits. Blocks are those of memory,
    whatever the layout of a parameter, and the states are the same with the kernel and without.

    Attributes:
        copies: rounded copies of parameters, laid out alike, that a step brings up to date.
        grad_scale: None, or a scalar by which a step divides the gradients as it reads them.
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
        self.copies: dict[nn.Parameter, Tensor] = {}
        self.grad_scale: Tensor | None = None
        self._tables: dict[Any, Any] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradients = [each for each in group["params"] if each.grad is not None]
            for parameter in with_gradients:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
            if with_gradients and own("adamw_8bit") and has_kernels(with_gradients[0].device):
                self._update_at_once(with_gradients, group)
            else:
                for parameter in with_gradients:
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
        """A step of one parameter in plain PyTorch."""
        state, weight = self.state[parameter], in_memory_order(parameter)
        gradient = in_memory_order(_laid_out(parameter)).float()
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        _prepare(state, parameter)
        beta1, beta2 = group["betas"]
        mean = _read(state, "exp_avg").lerp_(gradient, 1 - beta1)
        square = _read(state, "exp_avg_sq").mul_(beta2)
        square.addcmul_(gradient, gradient, value=1 - beta2)
        _write(state, "exp_avg", mean)
        _write(state, "exp_avg_sq", square)
        deviation = square.sqrt().div_(math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(mean, deviation, value=-group["lr"] / (1 - beta1 ** state["step"]))
        if parameter in self.copies:
            self.copies[parameter].copy_(parameter)

    def _update_at_once(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """A step of all parameters in one launch of a kernel for each kind of them."""
        from mifo.acceleration.adamw_kernel import Tables, launch

        kinds: dict[tuple, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            gradient = parameter.grad = _laid_out(parameter)
            _prepare(self.state[parameter], parameter)
            state = self.state[parameter]
            kind = (gradient.dtype, "exp_avg_scale" in state, parameter in self.copies)
            kinds[state["step"], kind].append(parameter)
        for (step, kind), same in kinds.items():
            _, quantised, _ = kind
            memory = [
                [each, each.grad, self.copies.get(each, each)]
                + [self.state[each][name] for name in MOMENTS]
                + [self.state[each][f"{name}_scale" if quantised else name] for name in MOMENTS]
                for each in same
            ]
            # pointers travel to the GPU only when one has changed
            pointers = tuple(tensor.data_ptr() for row in memory for tensor in row)
            if kind not in self._tables or self._tables[kind].pointers != pointers:
                self._tables[kind] = Tables(memory, pointers)
            mean, square = (_levels(name, parameters[0].device)[0] for name in MOMENTS)
            launch(self._tables[kind], kind, group, step, self.grad_scale, (mean, square))


def in_memory_order(tensor: Tensor) -> Tensor:
    """The numbers of a tensor without gaps, (n,), as they lie in memory, which is shared."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _laid_out(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter, which has one, in the parameter's layout."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def _prepare(state: dict[str, Any], parameter: nn.Parameter) -> None:
    """Moments of 0, where there are none yet."""
    if "exp_avg" in state:
        return
    quantised = parameter.numel() >= SMALLEST and not parameter.numel() % BLOCK
    for name in MOMENTS:
        if quantised:
            state[name] = torch.full_like(parameter, _code_of_zero(name), dtype=torch.uint8)
            state[f"{name}_scale"] = torch.zeros(parameter.numel() // BLOCK, 1, device=parameter.device)
        else:
            state[name] = torch.zeros_like(parameter, dtype=torch.float32)


def _read(state: dict[str, Any], name: str) -> Tensor:
    """A moment in 32 bits, (n,); of a small parameter the state itself."""
    if f"{name}_scale" not in state:
        return in_memory_order(state[name])
    levels, _ = _levels(name, state[name].device)
    blocks = levels.index_select(0, in_memory_order(state[name]).int()).view(-1, BLOCK)
    return blocks.mul_(state[f"{name}_scale"]).flatten()


def _write(state: dict[str, Any], name: str, moment: Tensor) -> None:
    """Keep a moment (n,), as the code of the nearest level in units of its block's largest number."""
    if f"{name}_scale" not in state:
        return  # changed in place
    blocks = moment.view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    _, thresholds = _levels(name, moment.device)
    codes = torch.bucketize(blocks / scale, thresholds, out_int32=True)
    in_memory_order(state[name]).copy_(codes.flatten())
    state[f"{name}_scale"].copy_(scale)


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


@cache
def _code_of_zero(name: str) -> int:
    return int(_levels(name, torch.device("cpu"))[0].abs().argmin())
