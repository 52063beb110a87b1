"""Joint attention over pixels and words in one row: bounded by a rule, and read.

B samples, n pixels (patches), L words, d width of a head. Pixels come before words in the joint sequence, or
after them where a family's network has them so (`words_first`).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mifo.acceleration.block_attention import block_attention, block_mask, runs_in_blocks
from mifo.acceleration.fused_attention import quick_to_start
from mifo.backbones.attention import Biases, Keep, attention_probabilities, unrounded
from mifo.method.backbone import Kind, Read, Rule, Rules, Site

QUERIES_AT_ONCE = 256  # whose whole rows are in memory


def place(kind: Kind, pixels: int, words_first: bool) -> slice:
    """Where the words, or so many pixels, stand in the joint sequence."""
    if words_first:
        return slice(-pixels) if kind == "words" else slice(-pixels, None)
    return slice(pixels, None) if kind == "words" else slice(pixels)


class JointRules:
    """The rules of one pass for the layers of a transformer, and the masks made of them, each made once."""

    def __init__(self, rules: Rules | None, words_first: bool) -> None:
        self._rules = rules
        self.words_first = words_first
        self._bias = Biases()
        self._blocks: dict[int, Any] = {}
        self._joint: dict[tuple[int, int], Rule] = {}
        self._fitted: dict[int, Rule] = {}

    def of(self, site: Site) -> Rule | None:
        """What bounds pixels as they attend to the keys of a site."""
        return self._rules.of(site) if self._rules else None

    def joint(self, size: tuple[int, int]) -> Rule | None:
        """What bounds the joint sequence."""
        if self._rules is None:
            return None
        if size not in self._joint:
            self._joint[size] = joint_rule(self._rules, size, self.words_first)
        return self._joint[size]

    def bias(self, rule: Rule | None, dtype: torch.dtype) -> Tensor | None:
        return None if rule is None else self._bias(rule, dtype)

    def fitted(self, rule: Rule, length: int, padding: Tensor | None) -> Rule:
        """A rule of one prompt's joint sequence, for a pass with a longer prompt beside it.

        Args:
            padding: −∞ where a sequence has no words, (B, 1, 1, length); other words beyond the rule's are
                open.
        """
        if padding is None:
            return rule
        if id(rule) not in self._fitted:
            queries, keys = (F.pad(bits, (0, length - bits.shape[1]), value=-1) for bits in rule)
            self._fitted[id(rule)] = Rule(queries, torch.where(padding.flatten(1) == 0, keys, 0))
        return self._fitted[id(rule)]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rule: Rule, scale: float) -> Tensor:
        """Attention (B, heads, n, d) bounded by a rule, on a GPU without a mask in memory."""
        if not runs_in_blocks(query):
            bias = self.bias(rule, query.dtype)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        if id(rule) not in self._blocks:
            self._blocks[id(rule)] = block_mask(*rule, len(query))
        return block_attention(query, key, value, self._blocks[id(rule)], scale)


class JointAttention:
    """Attention over pixels and words in one row, or over pixels alone; a family's class calls `joined`.

    Maps are computed beside the fused attention, those of words without n² numbers. With `whole_row` a map
    holds shares of the whole row, exp(q·k − lse); without, shares of the attention to keys of the site's own
    kind.

    Args:
        pixels: n.
    """

    def __init__(
        self,
        reads: Mapping[Site, Read],
        keep: Keep,
        rule: Rule | None,
        rules: JointRules,
        pixels: int,
        whole_row: bool,
    ) -> None:
        self.reads, self.keep, self.rule, self.rules = reads, keep, rule, rules
        self.pixels, self.whole_row = pixels, whole_row

    def place(self, kind: Kind) -> slice:
        """Where pixels or words stand in the joint sequence."""
        return place(kind, self.pixels, self.rules.words_first)

    def joined(
        self, attn: Any, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None
    ) -> Tensor:
        """(B, n + L, heads · d) of queries, keys and values (B, heads, n + L, d); keeps what is read.

        Args:
            padding: (B, 1, 1, n + L), −∞ at words that are none.
        """
        for site in self.reads:
            read = partial(self.read, site, padding)
            if site.kind == "pixels":  # n² numbers, which are computed again for the gradient and not kept
                read = partial(checkpoint, read, use_reentrant=False, preserve_rng_state=False)
            self.keep(site, read(query, key))
        query, key = query.to(value.dtype), key.to(value.dtype)
        return self.attend(attn, query, key, value, padding).transpose(1, 2).flatten(2)

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """(B, heads, n + L, d) of queries, keys and values of that shape; `bias` is that of padding."""
        scale = scale_of(query)
        with quick_to_start(query.shape[2]):
            if self.rule is not None:
                rule = self.rules.fitted(self.rule, key.shape[2], bias)
                return self.rules.attend(query, key, value, rule, scale)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)

    def read(self, site: Site, padding: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        """What a site's read keeps of the attention of pixels to the site's keys, (B, heads, n, n or L)."""
        return self.reads[site](self.probabilities(site, padding, query, key))

    def probabilities(self, site: Site, padding: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        """In 32 bits, of queries and keys (B, heads, n + L, d)."""
        pixels, own, scale = self.place("pixels"), self.place(site.kind), scale_of(query)
        asked, keys = query[:, :, pixels], key[:, :, own]
        bias = self.rules.bias(self.rules.of(site), torch.float32)
        if padding is not None and site.kind == "words":
            closed = padding[..., own].float()
            bias = closed if bias is None else closed + F.pad(bias, (0, closed.shape[-1] - bias.shape[-1]))
        if not self.whole_row:
            return attention_probabilities(asked, keys, scale, bias)
        rule = self.rule and self.rules.fitted(self.rule, key.shape[2], padding)
        if rule:
            rule = Rule(rule.queries[:, pixels], rule.keys)
        with unrounded(query):
            scores = scale * asked.float() @ keys.float().transpose(-1, -2)
            level = row_levels(asked, key, scale, rule, padding)
            return ((scores if bias is None else scores + bias) - level).exp()


def scale_of(query: Tensor) -> float:
    """Of the scores of queries (B, heads, n, d): 1/√d, as all families have it."""
    return query.shape[-1] ** -0.5


def joint_rule(rules: Rules, size: tuple[int, int], words_first: bool = False) -> Rule:
    """The rules between pixels and words as one rule over the joint sequence, (B or 1, n + L) bits of int64.

    The lower half of a query's bits says which pixels it sees, the upper half which words. Words see all
    words.
    """
    pixels, words, texts = rules.pixels[size], rules.words[size], rules.texts[size]
    queries = [
        _packed(pixels.queries, words.queries),
        _packed(texts.queries, torch.full_like(texts.queries, -1)),
    ]
    keys = [
        _packed(pixels.keys, torch.zeros_like(pixels.keys)),
        _packed(torch.zeros_like(words.keys), words.keys),
    ]
    order = -1 if words_first else 1
    return Rule(_joined(queries[::order]), _joined(keys[::order]))


def row_levels(query: Tensor, key: Tensor, scale: float, rule: Rule | None, padding: Tensor | None) -> Tensor:
    """log Σ exp(scale · q·k) of whole rows, (B, heads, n, 1) in 32 bits, a few queries at a time.

    Args:
        query: (B, heads, n, d), of pixels. key: (B, heads, n + L, d).
        rule: closes keys to these queries. padding: see `JointAttention.joined`.
    """

    def level(part: Tensor, bits: Tensor | None) -> Tensor:
        with unrounded(part):
            scores = scale * part.float() @ key.float().transpose(-1, -2)
            if padding is not None:
                scores = scores + padding
            if rule is not None and bits is not None:
                closed = ~Rule(bits, rule.keys).allowed()[:, None]
                scores = scores.masked_fill(closed, -torch.inf)
            return scores.logsumexp(-1, keepdim=True)

    parts = query.split(QUERIES_AT_ONCE, 2)
    bits = [None] * len(parts)
    if rule is not None:
        bits = rule.queries.split(QUERIES_AT_ONCE, 1)
    return torch.cat(
        [
            checkpoint(level, part, own, use_reentrant=False, preserve_rng_state=False)
            for part, own in zip(parts, bits, strict=True)
        ],
        2,
    )


def turned(states: Tensor, angles: Tensor) -> Tensor:
    """Queries or keys (B, heads, n + L, d) turned by their places, complex numbers (B or 1, n + L, d / 2)."""
    with unrounded(states):
        pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * angles[:, None]).flatten(3).to(states.dtype)


def joint_heads(
    attn: Any, hidden_states: Tensor, words: Tensor | None, words_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, heads, n + L, d); adapters on the projections take part."""

    def heads(projection: nn.Module, norm: nn.Module | None, states: Tensor) -> Tensor:
        split = projection(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return split if norm is None else norm(split)

    layers = ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None))
    found = [heads(projection, norm, hidden_states) for projection, norm in layers]
    if words is not None:
        layers = (
            (attn.add_q_proj, attn.norm_added_q),
            (attn.add_k_proj, attn.norm_added_k),
            (attn.add_v_proj, None),
        )
        added = [heads(projection, norm, words) for projection, norm in layers]
        order = -1 if words_first else 1
        found = [torch.cat(pair[::order], 2) for pair in zip(found, added, strict=True)]
    query, key, value = found
    return query, key, value


def _packed(low: Tensor, high: Tensor) -> Tensor:
    """Two rows of 32 bits as one of 64, (B, n)."""
    return high.long() << 32 | (low.long() & 0xFFFFFFFF)


def _joined(parts: list[Tensor]) -> Tensor:
    rows = max(len(part) for part in parts)
    return torch.cat([part.expand(rows, -1) for part in parts], 1)
