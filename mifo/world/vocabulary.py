"""The words of the miniature world and what each of them means in the drawings.

Everything an instance is *beyond* its words (the exact hue inside a colour word, the second colour, the
proportions, the pattern's size and angle) is continuous, so that a caption never tells a whole instance.
"""

THINGS = tuple("car house boat cup fish bird cat robot mushroom flower balloon rocket".split())

COLOURS: dict[str, tuple[float, float]] = {
    "red": (-10.0, 10.0),
    "orange": (22.0, 38.0),
    "yellow": (48.0, 62.0),
    "green": (95.0, 140.0),
    "cyan": (170.0, 190.0),
    "blue": (210.0, 240.0),
    "purple": (262.0, 285.0),
    "pink": (312.0, 335.0),
}
"""Colour word → its range of hues in degrees; between two words lies a gap that no thing's body takes."""

HELD_OUT_HUES = (0.6, 0.72)
"""The part of each colour word's range, as fractions, kept out of pretraining: benchmark hues."""

PATTERNS = ("plain", "striped", "dotted", "checked")
"""Pattern words; a plain thing carries no pattern word in a caption."""

BACKGROUNDS = (
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
"""The ten prompt endings of Break-a-Scene's evaluation (arXiv 2305.16311), each with a drawing of its own."""

PROMPT_START = "a photo of"


def words() -> list[str]:
    """Every word that a caption or an ordinary prompt may hold, in a fixed order."""
    others = "a an the and with next to left right top bottom of in on at two three four photo picture"
    plurals = (thing + "s" for thing in THINGS)
    text = " ".join([PROMPT_START, others, *THINGS, *plurals, *COLOURS, *PATTERNS, *BACKGROUNDS])
    return list(dict.fromkeys(text.lower().split()))
