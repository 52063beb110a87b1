"""What the attention of all families shares: probabilities, masks made of rules, passes with processors.

B samples, n queries, m keys, d width of a head.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mifo.method.backbone import Conditioning, DefaultSites, Read, Rule, Rules, Site

Keep = Callable[[Site, Tensor], None]
"""Takes what a read kept of a site; it may raise to end the pass."""


class Biases:
    """The masks of one pass, each made once though many sites have the same rule."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.dtype], tuple[Rule, Tensor]] = {}

    def __call__(self, rule: Rule, dtype: torch.dtype) -> Tensor:
        """See `bias_of`."""
        name = (id(rule), dtype)
        if name not in self._made:
            self._made[name] = rule, bias_of(rule, dtype)
        return self._made[name][1]


class AttentiveNetwork(ABC):
    """A network whose attention can be read and bounded for one pass; its processors are put back afterwards.

    Attributes:
        network: of diffusers, or what has its modules and configuration.
        sites: in order of execution. default_sites: see `DefaultSites`.
        layers: the sites of each attention layer, in order of execution.
        whole_row: whether a map holds shares of a query's whole row, though its site has a part of the keys.
    """

    whole_row = False

    def __init__(self, network: Any, sites: Sequence[Site], default_sites: DefaultSites) -> None:
        self.network, self.sites, self.default_sites = network, tuple(sites), default_sites
        named: dict[str, list[Site]] = {}
        for site in self.sites:
            named.setdefault(site.name, []).append(site)
        self.layers = list(named.values())
        self._modules: list[Any] = [network.get_submodule(name) for name in named]

    @abstractmethod
    def forward(self, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's plain prediction (B, C, h, w)."""

    @abstractmethod
    def processors(self, reads: Mapping[Site, Read], keep: Keep, rules: Rules | None) -> list[Any]:
        """A processor for each of the `layers`, with `rule`, which bounds it, and its `attend` of heads."""

    def queries(self, site: Site) -> slice:
        """Which queries of its layer are a site's, those of pixels."""
        return slice(None)

    def keys(self, site: Site) -> slice:
        """Which keys of its layer are a site's."""
        return slice(None)

    def predict(
        self,
        noisy: Tensor,
        time: Tensor,
        conditioning: Conditioning,
        reads: Mapping[Site, Read] | None = None,
        rules: Rules | None = None,
    ) -> tuple[Tensor, dict[Site, Tensor]]:
        """See `Backbone.predict`."""
        kept: dict[Site, Tensor] = {}
        if reads is None and rules is None:  # the network's own attention serves
            return self.forward(noisy, time, conditioning), kept
        with self.installed(self.processors(reads or {}, kept.__setitem__, rules)):
            return self.forward(noisy, time, conditioning), kept

    def maps(
        self,
        noisy: Tensor,
        time: Tensor,
        conditioning: Conditioning,
        reads: Mapping[Site, Read],
        rules: Rules | None = None,
    ) -> dict[Site, Tensor]:
        """See `Backbone.maps`."""
        kept: dict[Site, Tensor] = {}
        last = max(reads, key=lambda site: site.index)

        def keep(site: Site, read: Tensor) -> None:
            kept[site] = read
            if site == last:
                raise _AllRead

        with suppress(_AllRead), self.installed(self.processors(reads, keep, rules)):
            self.forward(noisy, time, conditioning)
        return kept

    def enable_checkpointing(self) -> None:
        """Compute activations twice instead of keeping them; both times by the same processors."""

        draws = draws_in_training(self.network)

        def twice(module: Any, *inputs: Any) -> Any:
            then = [each.processor for each in self._modules]
            return checkpoint(
                module.__call__,
                *inputs,
                use_reentrant=False,
                preserve_rng_state=draws,
                context_fn=lambda: (nullcontext(), self.installed(then)),
            )

        self.network.enable_gradient_checkpointing(gradient_checkpointing_func=twice)

    @contextmanager
    def installed(self, processors: Sequence[object]) -> Iterator[None]:
        """Attention layers with these processors within the `with` block."""
        before = [module.processor for module in self._modules]
        try:
            for module, processor in zip(self._modules, processors, strict=True):
                module.processor = processor
            yield
        finally:
            for module, processor in zip(self._modules, before, strict=True):
                module.processor = processor


def draws_in_training(network: nn.Module) -> bool:
    """Whether a network in training draws random numbers, by dropout.

    What is computed twice must then find the state of the generator again, which no CUDA graph can keep.
    """
    shares = ("p", "dropout", "attention_dropout")  # of `nn.Dropout`, and as transformers' layers name them
    found = (getattr(module, share, None) for module in network.modules() for share in shares)
    return any(isinstance(each, float) and each > 0 for each in found)


class _AllRead(Exception):
    """Ends a pass of which nothing further is read."""


def attention_probabilities(query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scale · Q Kᵀ + bias) in 32 bits, also under autocast, for half precision would blur the maps.

    Args:
        query, key: (B, heads, n, d) and (B, heads, m, d).
        bias: added to the scores, broadcastable to the result; −∞ closes a key.

    Returns:
        (B, heads, n, m), float32, rows summing to one.
    """
    with unrounded(query):
        scores = scale * query.float() @ key.float().transpose(-1, -2)
        return (scores if bias is None else scores + bias).softmax(-1)


def unrounded(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast rounds no products on the tensor's device; where tensors have shapes alone it never does."""
    device = tensor.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def bias_of(rule: Rule, dtype: torch.dtype) -> Tensor:
    """0 where a query may attend to a key, −∞ elsewhere: (B or 1, 1, n, m)."""
    allowed = rule.allowed()[:, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -math.inf)
