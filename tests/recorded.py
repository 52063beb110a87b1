"""A stand-in for CUDA graphs without a GPU: operations recorded once and replayed without their Python."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

# what a capture on a GPU would refuse: values that travel to the processor or from it
FORBIDDEN = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "equal.default")


class Tape(TorchDispatchMode):
    """Records every operation of `function` on trees of tensors, and replays them on others of that form."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []
        self.inputs = tensors(inputs)
        with self:
            self.outputs = function(*inputs)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert not any(name in str(operation) for name in FORBIDDEN), f"{operation} in a captured function"
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    def __call__(self, *inputs: Any) -> Any:
        values = {id(old): new for old, new in zip(self.inputs, tensors(inputs), strict=True)}

        def now(tree: Any) -> Any:
            return tree_map_only(Tensor, lambda each: values.get(id(each), each), tree)

        for operation, args, kwargs, before in self.operations:
            after = operation(*now(args), **now(kwargs))
            values |= {
                id(old): new
                for old, new in zip(tree_flatten(before)[0], tree_flatten(after)[0], strict=True)
                if isinstance(old, Tensor)
            }
        return now(self.outputs)


class Recordings:
    """Makes stand-ins for graphs; `count` says how many it has made."""

    def __init__(self) -> None:
        self.count = 0

    def capture(self, function: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
        """Takes the place of `mifo.acceleration.graphs.capture`."""
        self.count += 1
        samples = tree_map_only(Tensor, lambda each: each.detach().clone(), tuple(inputs))
        leaves, structure = tree_flatten(function(*samples))
        buffers = [each.clone() if isinstance(each, Tensor) else each for each in leaves]
        tape = Tape(function, samples)

        @torch.no_grad()
        @torch.autocast("cpu", enabled=False)  # what was recorded has been through it
        def replay(*inputs: Any) -> Any:
            for place, each in zip(tensors(samples), tensors(inputs), strict=True):
                place.copy_(each)  # refuses another shape, as the graph does
            for buffer, value in zip(buffers, tree_flatten(tape(*samples))[0], strict=True):
                if isinstance(buffer, Tensor):
                    buffer.copy_(value)
            return tree_unflatten(buffers, structure)

        return replay


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    return [each for each in tree_flatten(tree)[0] if isinstance(each, Tensor)]
