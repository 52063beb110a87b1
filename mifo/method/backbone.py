"""What the method asks of a text-to-image model. A model family answers in its own room, `mifo/backbones`.

Letters: B samples, n = h · w pixels of a site, L words (tokens) of the conditioning sequence, C channels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor

Kind = Literal["words", "pixels"]
Stage = Literal["semantic", "finetuning"]


@dataclass(frozen=True)
class Site:
    """A place in the network where the attention of image pixels can be read and bounded.

    Attributes:
        index: place in the order of execution, from 0.
        name: path of the module, by which settings name the site.
        kind: what the pixels attend to there: the `words` of the prompt, or the `pixels` of the image. A
            layer that attends to both at once is two sites of one name.
        size: (h, w) of the pixels.
    """

    index: int
    name: str
    kind: Kind
    size: tuple[int, int]


@dataclass(frozen=True)
class DefaultSites:
    """The sites that the method reads unless the settings name others, in order of execution.

    Attributes:
        semantic, finetuning: word maps that the attention losses of the two stages compare with the masks.
        guidance: words and pixels whose attention guides the latents.
        shapes: words and pixels, of one size, from which shapes are renewed.
    """

    semantic: tuple[Site, ...]
    finetuning: tuple[Site, ...]
    guidance: tuple[Site, ...]
    shapes: tuple[Site, ...]


class Conditioning(NamedTuple):
    """What a prompt becomes for the network: named tensors whose first dimension is the sample.

    The method picks, joins and hands on rows; what the parts mean is the family's business.
    """

    parts: dict[str, Tensor]

    def rows(self, chosen: slice) -> Self:
        """The samples of a slice."""
        return type(self)({name: part[chosen] for name, part in self.parts.items()})

    @classmethod
    def joined(cls, several: Sequence[Self]) -> Self:
        """All samples, in this order."""
        return cls({name: torch.cat([each.parts[name] for each in several]) for name in several[0].parts})

    def to(self, dtype: torch.dtype) -> Self:
        """All parts in one precision."""
        return type(self)({name: part.to(dtype) for name, part in self.parts.items()})

    @property
    def samples(self) -> int:
        return len(next(iter(self.parts.values())))


class Rule(NamedTuple):
    """Who may attend to whom: a query sees the keys with which it has a bit in common.

    Attributes:
        queries: int32 (B or 1, n). keys: int32 (B or 1, n or L).
    """

    queries: Tensor
    keys: Tensor

    def allowed(self) -> Tensor:
        """Bool (B or 1, queries, keys)."""
        return self.queries[:, :, None] & self.keys[:, None] != 0


class Rules(NamedTuple):
    """The rules of one pass, for sites of each size.

    Attributes:
        words, pixels: which words and which pixels the pixels see.
        texts: which pixels the words see, where words have queries of their own; they see all words.
    """

    words: dict[tuple[int, int], Rule]
    pixels: dict[tuple[int, int], Rule]
    texts: dict[tuple[int, int], Rule]

    def of(self, site: Site) -> Rule:
        return (self.words if site.kind == "words" else self.pixels)[site.size]


Read = Callable[[Tensor], Tensor]
"""Takes a site's attention probabilities (B, heads, n, L or n), float32, and gives what is kept of them."""


class NoiseProcess(Protocol):
    """How noise is added and taken away again."""

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times (count,) of a learning step, on the CPU."""

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor | float) -> Tensor:
        """The noisy latents (B, C, h, w) at the times (B,), or at one for all."""

    def target(self, clean: Tensor, noise: Tensor, time: Tensor | float) -> Tensor:
        """What the network is to predict for them."""

    def share(self, time: Tensor) -> Tensor:
        """The time as a share of the whole, in [0, 1]: 0 is clean, 1 is noise."""

    def times(self, steps: int) -> Sequence[float]:
        """The times of so many sampling steps, from noise to clean."""

    def step(self, noisy: Tensor, prediction: Tensor, times: Sequence[float], step: int) -> Tensor:
        """The latents after sampling step number `step` of those `times`, along a prediction."""


class Backbone(Protocol):
    """A text-to-image model as the method sees it."""

    latent_shape: tuple[int, int, int]  # (C, h, w)
    process: NoiseProcess
    sites: tuple[Site, ...]  # in order of execution
    default_sites: DefaultSites

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of prompts, (B, …)."""

    def encode(self, ids: Tensor) -> Conditioning:
        """What token ids become for the network, with gradients to the new words and the text encoders."""

    def encode_images(self, images: Iterable[Tensor], at_once: int = 8) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the latents of images (3, H, W) in [0, 1]."""

    def decode_latents(self, latents: Tensor, at_once: int = 4) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of latents (B, C, h, w)."""

    def predict(
        self,
        noisy: Tensor,
        time: Tensor,
        conditioning: Conditioning,
        reads: Mapping[Site, Read] | None = None,
        rules: Rules | None = None,
    ) -> tuple[Tensor, dict[Site, Tensor]]:
        """The network's prediction, and what each read kept, in order of execution.

        Args:
            noisy: (B, C, h, w). time: one for all, or (B,).
            reads: sites whose attention is read, which they then compute in the open and in 32 bits.
            rules: bound attention at every site; None: every pixel attends to everything.
        """

    def maps(
        self,
        noisy: Tensor,
        time: Tensor,
        conditioning: Conditioning,
        reads: Mapping[Site, Read],
        rules: Rules | None = None,
    ) -> dict[Site, Tensor]:
        """As `predict`, but ends after the last site that is read."""
