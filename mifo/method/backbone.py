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

    A layer that attends to words and pixels at once is two sites of one name.
    """

    index: int  # place in the order of execution, from 0
    name: str  # path of the module, by which settings name the site
    kind: Kind  # what the pixels attend to there: the words of the prompt, or the pixels of the image
    size: tuple[int, int]  # (h, w) of the pixels


@dataclass(frozen=True)
class DefaultSites:
    """The sites that the method reads unless the settings name others, in order of execution."""

    semantic: tuple[Site, ...]  # word maps that the attention losses of stage 1 compare with the masks
    finetuning: tuple[Site, ...]  # the same of stage 2
    guidance: tuple[Site, ...]  # words and pixels whose attention guides the latents
    shapes: tuple[Site, ...]  # words and pixels, of one size, from which shapes are renewed


class Conditioning(NamedTuple):
    """A prompt as the network reads it: named tensors whose first dimension is the sample.

    The method picks rows and passes them on; only the model family knows what the parts mean.
    """

    parts: dict[str, Tensor]

    def rows(self, chosen: slice) -> Self:
        """The samples of a slice."""
        return type(self)({name: part[chosen] for name, part in self.parts.items()})

    def to(self, dtype: torch.dtype) -> Self:
        """All parts in one precision, but whole numbers."""
        return type(self)(
            {name: part.to(dtype) if part.is_floating_point() else part for name, part in self.parts.items()}
        )

    @property
    def samples(self) -> int:
        return len(next(iter(self.parts.values())))


class Rule(NamedTuple):
    """Who may attend to whom: a query sees the keys with which it has a bit in common."""

    queries: Tensor  # int32 (B or 1, n)
    keys: Tensor  # int32 (B or 1, n or L)

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
"""A function of a site's attention probabilities (B, heads, n, L or n), float32; its result is kept."""


class NoiseProcess(Protocol):
    """How noise is added and taken away again."""

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times (count,) of a learning step, on the CPU."""

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor | float) -> Tensor:
        """The noisy latents (B, C, h, w) at the times (B,), or at one for all."""

    def target(self, clean: Tensor, noise: Tensor, time: Tensor | float) -> Tensor:
        """What the network is trained to predict, (B, C, h, w)."""

    def share(self, time: Tensor) -> Tensor:
        """The time as a share of the whole, in [0, 1]: 0 is clean, 1 is noise."""

    def times(self, steps: int) -> Sequence[float]:
        """The times of this number of sampling steps, from noise to clean."""

    def step(self, noisy: Tensor, prediction: Tensor, times: Sequence[float], step: int) -> Tensor:
        """The latents after sampling step number `step` of those `times`, along a prediction."""


class Backbone(Protocol):
    """A text-to-image model as the method sees it."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""

    @property
    def process(self) -> NoiseProcess: ...

    @property
    def sites(self) -> tuple[Site, ...]:
        """In order of execution."""

    @property
    def default_sites(self) -> DefaultSites: ...

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of prompts, (B, …)."""

    def encode(self, ids: Tensor) -> Conditioning:
        """The conditioning of token ids, with gradients to the new words and the text encoders."""

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
        """The network's prediction, and the result of each read, in order of execution.

        Args:
            noisy: (B, C, h, w). time: one for all, or (B,).
            reads: what is kept of the attention of some sites, which then compute all of it, in 32 bits.
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
