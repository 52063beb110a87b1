"""Break-a-Scene's protocol (arXiv 2305.16311, section 4): the text that a picture is compared with.

Its prompts run over all subsets of the instances and ten endings: `layout=power_set`.
"""

import re
from collections.abc import Sequence


def name_classes(prompt: str, tokens: Sequence[str], class_names: Sequence[str | None]) -> str:
    """Replace each instance token of `prompt` by its class name ("object" where it has none).

    Break-a-Scene compares a picture with this text, since an evaluator does not know the learned words.
    """
    names = dict(zip(tokens, (name or "object" for name in class_names), strict=True))
    pattern = "|".join(re.escape(token) for token in tokens)
    return re.sub(pattern, lambda match: names[match.group()], prompt) if names else prompt
