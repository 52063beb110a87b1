"""What weights have learned, as matrices of low rank beside the base model's (LoRA, arXiv 2106.09685)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LowRank:
    """Factors for layers of networks.

    Attributes:
        factors: by network and path of a layer: A (r, in) and B (out, r), of convolutions (r, in, h, w) and
            (out, r, 1, 1). B·A is added to the layer's weight.
        error: the norm of what the factors lack, over the norm of all that was learned; [0, 1].
        left_out: the same of the weights for which there are no factors, such as norms and biases.
    """

    factors: dict[tuple[str, str], tuple[Tensor, Tensor]]
    error: float
    left_out: float


@torch.no_grad()
def low_rank(
    learned: Mapping[str, nn.Module],
    base: Mapping[str, nn.Module],
    rank: int,
    dtype: torch.dtype,
    holds: Callable[[str, str], bool],
) -> LowRank:
    """The differences of the networks `learned` to `base`, each by its largest singular values.

    Adapters in `learned` must be merged. The errors are those of factors rounded to `dtype`.

    Args:
        holds: whether the LoRA's form has a place for a layer, by its network and path.
    """
    factors, total, lacking, outside = {}, 0.0, 0.0, 0.0
    for network, path, layer, difference in _differences(learned, base):
        squares = float(difference.square().sum())
        total += squares
        if not isinstance(layer, nn.Linear | nn.Conv2d) or not holds(network, path):
            outside += squares
            continue
        a, b = (each.to(dtype).contiguous() for each in _factors(difference, rank))
        factors[network, path] = a, b
        product = (b.float().flatten(1) @ a.float().flatten(1)).view_as(difference)
        lacking += float((difference - product).square().sum())
    whole = max(total, 1e-30)
    return LowRank(factors, ((lacking + outside) / whole) ** 0.5, (outside / whole) ** 0.5)


def _differences(
    learned: Mapping[str, nn.Module], base: Mapping[str, nn.Module]
) -> Iterator[tuple[str, str, nn.Module | None, Tensor]]:
    """Network, path, layer if it is the layer's matrix, and difference of every parameter that changed."""
    for network, module in base.items():
        changed = dict(learned[network].named_parameters())
        for name, before in module.named_parameters():
            after = changed.get(name)  # tables of words have other names where there are new words
            if after is None or torch.equal(after, before):
                continue
            path, _, kind = name.rpartition(".")
            layer = module.get_submodule(path) if kind == "weight" else None
            yield network, path, layer, after.float() - before.float()


def _factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    matrix = difference.flatten(1)
    side = min(matrix.shape)
    with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
        # of the random projection, which is exact where all singular values are asked for
        torch.manual_seed(0)
        u, values, v = torch.svd_lowrank(matrix, q=min(rank + 16, side), niter=4)
    rank = min(rank, side)
    root = values[:rank].sqrt()
    a, b = (v[:, :rank] * root).T, u[:, :rank] * root
    return a.reshape(rank, *difference.shape[1:]), b.reshape(*b.shape, *(1,) * (difference.ndim - 2))
