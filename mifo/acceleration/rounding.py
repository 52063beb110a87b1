"""Passes on rounded copies of a module's weights, which are made once instead of at each pass."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class RoundedWeights:
    """Calls a module with copies in place of some of its parameters.

    Attributes:
        copies: in `dtype`, by parameter and laid out as it; those of parameters that learn are leaves that
            gradients flow to. Whoever changes a parameter brings its copy up to date.
    """

    def __init__(self, module: nn.Module, chosen: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        self._module = module
        self.copies: dict[nn.Parameter, Tensor] = {
            parameter: parameter.detach().to(dtype).requires_grad_(parameter.requires_grad)
            for parameter in chosen.values()
        }
        self._by_name = {name: self.copies[parameter] for name, parameter in chosen.items()}

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return functional_call(self._module, self._by_name, inputs, options)


def frozen_products(module: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen weights in 32 bits that autocast would round at each pass, by name."""
    return {
        f"{name}.{own}": parameter
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | nn.Conv2d)
        for own, parameter in part.named_parameters(recurse=False)
        if not parameter.requires_grad and parameter.dtype == torch.float32
    }


def every_weight(module: nn.Module) -> dict[str, nn.Parameter]:
    """All weights by name but those of modules that round their own rows as they look them up."""
    apart = {
        id(own)
        for part in module.modules()
        if getattr(part, "rounds_itself", False)
        for own in part.parameters(recurse=False)
    }
    return {name: each for name, each in module.named_parameters() if id(each) not in apart}
