"""Editability: does the picture show what its prompt says?"""

import re
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from mifo.metrics.metric import Features, Metric


class PromptSimilarity(Metric):
    """Mean cosine of image and text features of CLIP: [−1, 1], higher is better.

    As in Break-a-Scene (arXiv 2305.16311, section 4), texts are prompts whose instance tokens are replaced by
    class names (`name_classes`).
    """

    encoder = "image_text"

    @staticmethod
    def inputs(picture: Features) -> tuple[Tensor, ...]:
        return picture.whole_clip, picture.prompt_clip

    def update(self, images: Tensor, texts: Tensor) -> None:
        """Take image features (B, D) and the features of their texts (B, D), not necessarily normalised."""
        super().update(F.cosine_similarity(images.float(), texts.float(), dim=-1))


def name_classes(prompt: str, tokens: Sequence[str], class_names: Sequence[str | None]) -> str:
    """Replace each instance token of `prompt` by its class name ("object" where it has none).

    Break-a-Scene compares a picture with this text, since an evaluator does not know the learned words.
    """
    names = dict(zip(tokens, (name or "object" for name in class_names), strict=True))
    pattern = "|".join(re.escape(token) for token in tokens)
    return re.sub(pattern, lambda match: names[match.group()], prompt) if names else prompt
