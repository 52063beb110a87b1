"""The three walks of the design page are short, along files that exist."""

import re
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_each_walk_is_at_most_six_rooms_and_none_twice():
    """A mask from file to loss, a box from YAML to attention, a loss weight from YAML to gradient."""
    section = (ROOT / "docs" / "design.md").read_text().split("## Three walks")[1].split("\n## ")[0]
    walks = [re.findall(r"`(\w+(?:/\w+)+\.py)`", each) for each in section.strip().split("\n\n")]
    assert len(walks) == 3
    for files in walks:
        assert all((ROOT / "mifo" / file).is_file() for file in files)
        rooms = [room for room, _ in groupby(file.split("/")[0] for file in files)]
        assert 1 < len(rooms) <= 6 and len({*rooms}) == len(rooms), rooms
