"""Break-a-Scene's evaluation prompts (arXiv 2305.16311, section 4): ten endings over subsets of instances."""

import re
from collections.abc import Sequence
from itertools import combinations

ENDINGS = (
    "at the beach",
    "in the jungle",
    "in the snow",
    "in the street",
    "on top of a pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with the Eiffel tower in the background",
    "floating on top of water",
)


def evaluation_prompts(
    tokens: Sequence[str], endings: Sequence[str] = ENDINGS, sizes: Sequence[int] | None = None
) -> list[str]:
    """Return "a photo of {tokens} {ending}" for every non-empty subset of `tokens` and every ending.

    `sizes` keeps only subsets of those sizes (default: all). The order is by size, then by position.
    """
    subsets = [subset for size in sizes or range(1, len(tokens) + 1) for subset in combinations(tokens, size)]
    return [f"a photo of {' and '.join(subset)} {ending}" for subset in subsets for ending in endings]


def name_classes(prompt: str, tokens: Sequence[str], class_names: Sequence[str | None]) -> str:
    """Replace each instance token of `prompt` by its class name ("object" where it has none).

    Break-a-Scene compares a picture with this text, since an evaluator does not know the learned words.
    """
    names = dict(zip(tokens, (name or "object" for name in class_names), strict=True))
    pattern = "|".join(re.escape(token) for token in tokens)
    return re.sub(pattern, lambda match: names[match.group()], prompt) if names else prompt
