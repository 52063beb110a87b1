"""Does attention do what it is told? Maps and rules of one pass, against dense attention on a few queries.

A library's attention that ignores a mask, or maps of other queries, would let a run learn nothing for hours.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mifo.backbones.attention import AttentiveNetwork, unrounded
from mifo.errors import MifoError
from mifo.method.backbone import Conditioning, Rules, Site

QUERIES = 16  # of each layer
MOST_LEAK = 1e-3  # of a query's attention, to keys that are closed to it
Attend = Callable[..., Tensor]


@torch.no_grad()
def check_maps(
    network: AttentiveNetwork, noisy: Tensor, time: Tensor, conditioning: Conditioning, sites: Sequence[Site]
) -> None:
    """Compare the probabilities that reads are given with those of the same queries and keys.

    Raises:
        MifoError: a site's probabilities are others, or were not read.
    """
    kept: dict[Site, Tensor] = {}
    off: dict[Site, float] = {}
    seen: list[tuple[Sequence[Site], Tensor, Tensor]] = []

    def watch(layer: Sequence[Site], attend: Attend) -> Attend:
        def watched(attn, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
            if any(site in sites for site in layer):
                scores = _scores(query[:, :, _some(query)], key)
                seen.append((layer, scores if bias is None else scores + bias, query))
            return attend(attn, query, key, value, bias)

        return watched

    reads = dict.fromkeys(sites, lambda probabilities: probabilities.clone())
    with _watched(network, network.processors(reads, kept.__setitem__, None), watch):
        network.forward(noisy, time, conditioning)
    for layer, scores, query in seen:
        for site in (site for site in layer if site in kept):
            keys = network.keys(site)
            expected = scores.softmax(-1)[..., keys] if network.whole_row else scores[..., keys].softmax(-1)
            chosen, asked = _some(query), torch.arange(query.shape[2])[network.queries(site)]
            own = torch.isin(chosen, asked)
            found = kept[site][:, :, chosen[own] - asked[0]]
            off[site] = _distance(found, expected[:, :, own], query.dtype)
    for site in sites:
        if not off.get(site, 2.0) <= 1:
            raise MifoError(
                f"the attention maps read at {site.name} are not those of its queries and keys, so that no "
                "attention loss would teach anything; leave out what replaces the model's attention."
            )


@torch.no_grad()
def check_rules(
    network: AttentiveNetwork, noisy: Tensor, time: Tensor, conditioning: Conditioning, rules: Rules
) -> None:
    """Compare attention that rules bound with a dense softmax over what they leave, at every layer.

    Values that are 1 where a key is closed to a query, and 0 elsewhere, tell in any precision how much of its
    attention goes there.

    Raises:
        MifoError: a layer attends to what is closed, or otherwise than it should.
    """
    found: list[tuple[str, float, float]] = []
    processors = network.processors({}, lambda site, read: None, rules)
    rule_of = {layer[0].name: each.rule for layer, each in zip(network.layers, processors, strict=True)}

    def watch(layer: Sequence[Site], attend: Attend) -> Attend:
        def watched(attn, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
            attended = attend(attn, query, key, value, bias)
            chosen = _some(query)[: value.shape[-1]]
            closed = ~rule_of[layer[0].name].allowed()[:, chosen]  # (B, queries, keys)
            probe = torch.zeros_like(value)
            probe[..., : len(chosen)] = closed[:, None].mT.to(value.dtype)
            leaks = attend(attn, query, key, probe, bias)[:, :, chosen, torch.arange(len(chosen))]
            scores = _scores(query[:, :, chosen], key).masked_fill(closed[:, None], -torch.inf)
            expected = scores.softmax(-1) @ value.float()
            off = _distance(attended[:, :, chosen], expected, value.dtype)
            found.append((layer[0].name, leaks.float().nan_to_num().abs().max().item(), off))
            return attended

        return watched

    with _watched(network, processors, watch):
        network.forward(noisy, time, conditioning)
    for name, leak, off in found:
        if not leak <= MOST_LEAK or not off <= 1:
            raise MifoError(
                f"the attention at {name} does not obey the rules of boxes ({leak:.1%} of a query's attention"
                " goes to what is closed to it); leave out what replaces the model's attention."
            )


@contextmanager
def _watched(
    network: AttentiveNetwork, processors: list, watch: Callable[[Sequence[Site], Attend], Attend]
) -> Iterator[None]:
    for layer, processor in zip(network.layers, processors, strict=True):
        processor.attend = watch(layer, processor.attend)
    with network.installed(processors):
        yield


def _some(query: Tensor) -> Tensor:
    """Places of a few queries of (B, heads, n, d), from the first to the last."""
    last = query.shape[2] - 1
    return torch.linspace(0, last, min(QUERIES, last + 1)).round().long()


def _scores(query: Tensor, key: Tensor) -> Tensor:
    with unrounded(query):
        return query.shape[-1] ** -0.5 * query.float() @ key.float().mT


def _distance(found: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The largest difference as a share of what the precision allows; more than 1 is too much.

    Numbers that are not finite are told of by the losses.
    """
    if not expected.isfinite().all():
        return 0.0
    allowed = (0.02 if dtype is torch.float32 else 0.1) * expected.abs().max().clamp_min(1e-8)
    return ((found.float() - expected).abs().max() / allowed).item()
