"""Words that say a whole thing, as the words of learned instances do.

The seventy words of the captions leave most of a thing unsaid. In pretraining a small network writes a word
for any thing from its true attributes: an offset from its class word. So every class word has a neighbourhood
of words that the denoiser draws, and Textual Inversion (arXiv 2208.01618) finds the word of its picture. The
weights in the repository do not hold the network.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mifo.world.scenes import Identities
from mifo.world.vocabulary import PATTERNS, THINGS

ATTRIBUTES = len(THINGS) + len(PATTERNS) + 18

OFFSET = 1.0
"""Length of a word's offset from its class word; ordinary words have rows of length 0.3."""

SCALES = (0.5, 1.5)
"""Range of the factors by which offsets are stretched: the way to a word says what the word says."""

NOISE = 0.05
"""Largest deviation of the noise on each number of an offset.

300 steps of Adam at a rate of 4e-3 move numbers that do not matter as far (0.05): such moves must not matter.
"""

FROM_MEAN = 0.15
"""Share of words at an offset from the mean of all words: a new word without an initializer starts there."""


def attributes(identities: Identities) -> Tensor:
    """What makes things of shape (…) these things, as numbers of about unit size: (…, ATTRIBUTES).

    Equal pictures have equal numbers: a plain thing has no pattern's colour, size or place, and a pattern
    turned by π with the phase reversed is the same one.
    """
    patterned = (identities.pattern > 0).unsqueeze(-1)
    turn, phase = identities.angle, 2 * math.pi * identities.phase
    shape = [
        identities.frequency - 3.2,
        torch.cos(2 * turn),
        torch.sin(2 * turn),
        torch.cos(phase),
        torch.sin(phase) * torch.cos(turn),
        torch.sin(phase) * torch.sin(turn),
    ]
    return torch.cat(
        [
            F.one_hot(identities.thing, len(THINGS)).float(),
            F.one_hot(identities.pattern, len(PATTERNS)).float(),
            identities.body * 2 - 1,
            identities.accent * 2 - 1,
            identities.proportions * 2 - 1,
            (identities.second * 2 - 1) * patterned,
            torch.stack(shape, -1) * patterned,
        ],
        -1,
    )


class WordWriter(nn.Module):
    """Attributes (…, ATTRIBUTES) → offsets (…, width), all of one length."""

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(ATTRIBUTES, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, width),
        )

    def forward(self, attributes: Tensor) -> Tensor:
        return OFFSET * F.normalize(self.layers(attributes), dim=-1)


def rows_of_words(table: Tensor, classes: Tensor, offsets: Tensor, around_mean: Tensor) -> Tensor:
    """Rows (…, width) of words at ``offsets`` from the rows ``classes`` (…) of the table or, where
    ``around_mean`` (…), from the mean of the table."""
    return torch.where(around_mean.unsqueeze(-1), table.mean(0), table[classes]) + offsets
