"""Who may attend to whom in masked attention (Bounded Attention, arXiv 2403.16990, as in MIFO, 2511.00542).

Letters: B samples, S subjects, L tokens of the prompt, n = h · w pixels of a site.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mifo.method.backbone import Rule, Rules
from mifo.method.prompts.instances import PromptTokens

MOST_SUBJECTS = 27  # each has a bit of 32
# bits of words that are closed to all, words open to all, the first end-of-text token, and the background
_FILTER, _OPEN, _END, _BACKGROUND = (1 << place for place in range(27, 31))
_ALL = -1


class SubjectWords(NamedTuple):
    """Where the words of the subjects stand in a prompt."""

    subjects: Tensor  # bool (S, L), the tokens of each subject; no token of two
    filtered: Tensor  # bool (L,), function words
    end: Tensor  # bool (L,), the first end-of-text token
    leading: Tensor  # (S,) position of each subject's leading token

    @classmethod
    def of(cls, positions: Sequence[Sequence[int]], tokens: PromptTokens, device: torch.device) -> Self:
        """From the positions of each subject's tokens in a prompt, the leading one last."""
        subjects = torch.zeros(len(positions), tokens.length, dtype=torch.bool)
        for row, places in zip(subjects, positions, strict=True):
            row[list(places)] = True
        filtered = torch.zeros(tokens.length, dtype=torch.bool)
        filtered[list(tokens.filter_indices)] = True
        end = torch.arange(tokens.length) == tokens.eos_index
        leading = torch.tensor([places[-1] for places in positions])
        return cls(*(part.to(device) for part in (subjects, filtered, end, leading)))

    @property
    def context(self) -> Tensor:
        """Bool (1, S, L): a subject's tokens and the first end-of-text token, for the guidance loss."""
        return (self.subjects | self.end)[None]


def word_rule(shapes: Tensor, words: SubjectWords, guidance: bool) -> Rule:
    """Pixels see the words of their own subject, function words are closed, other words are open.

    The first end-of-text token is closed to the background. In guidance passes the background may attend to
    every subject and to the end-of-text token.

    Args:
        shapes: bool (B, S, n), the pixels of each subject; the background is what no subject has.

    Returns:
        Bits of pixels (B, n) and of words (1, L).
    """
    background = ~shapes.any(dim=1)
    pixels = _memberships(shapes) | _OPEN
    if guidance:
        pixels = torch.where(background, _ALL ^ _FILTER, pixels | _END)
    else:
        pixels = torch.where(background, pixels, pixels | _END)
    tokens = _memberships(words.subjects[None])
    tokens = torch.where(tokens == 0, _OPEN, tokens)
    tokens = torch.where(words.end, _END, tokens)
    return Rule(pixels, tokens.masked_fill(words.filtered, _FILTER))


def pixel_rule(shapes: Tensor) -> Rule:
    """Pixels of different subjects do not see each other; all see the background, and it sees all.

    Pixels where shapes overlap belong to all of their subjects.

    Args:
        shapes: bool (B, S, n).

    Returns:
        Bits of pixels as queries and as keys, (B, n) both.
    """
    own = _memberships(shapes)
    return Rule(torch.where(own == 0, _ALL, own | _BACKGROUND), torch.where(own == 0, _BACKGROUND, own))


def text_rule(words: SubjectWords, pixels: Tensor) -> Rule:
    """A subject's words see its pixels and the background; other words see all pixels.

    So words carry nothing from one subject to another where they have queries of their own, in joint
    attention.

    Args:
        pixels: their bits as keys (B, n), see `pixel_rule`.

    Returns:
        Bits of words as queries (1, L), and of pixels as keys.
    """
    tokens = _memberships(words.subjects[None])
    return Rule(torch.where(tokens == 0, _ALL, tokens | _BACKGROUND), pixels)


def region_rules(
    shapes_at: Callable[[tuple[int, int]], Tensor],
    sizes: Collection[tuple[int, int]],
    words: SubjectWords,
    guidance: bool,
    halves: bool = True,
) -> Rules:
    """The rules of a guidance pass, of the conditional half alone, or of a denoising pass.

    Args:
        shapes_at: gives for a size bool shapes (B, S, h, w).
        halves: whether a denoising pass has an unconditional half first, which sees every word; pixels are
            bounded in both.
    """
    of_words, of_pixels, of_texts = {}, {}, {}
    for size in sizes:
        shapes = shapes_at(size).flatten(2)
        word, pixel = word_rule(shapes, words, guidance), pixel_rule(shapes)
        text = text_rule(words, pixel.keys)
        if halves and not guidance:
            word = Rule(torch.cat([torch.full_like(word.queries, _ALL), word.queries]), word.keys)
            pixel = Rule(*(torch.cat([bits, bits]) for bits in pixel))
            queries = text.queries.expand(len(shapes), -1)
            text = Rule(torch.cat([torch.full_like(queries, _ALL), queries]), pixel.keys)
        of_words[size], of_pixels[size], of_texts[size] = word, pixel, text
    return Rules(of_words, of_pixels, of_texts)


def _memberships(rows: Tensor) -> Tensor:
    """A bit for each of the S rows that is set: bool (B, S, n) to int32 (B, n)."""
    # bits made on the device: a copy from the processor would wait for it
    places = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device)
    return (rows.int() << places[:, None]).sum(dim=1, dtype=torch.int32)
