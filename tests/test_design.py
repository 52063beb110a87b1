"""The design page: the method knows no framework, no model and no other room, and the walks are short."""

import ast
import re
from itertools import groupby
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mifo"
FOREIGN = {"hydra", "omegaconf", "lightning", "wandb", "diffusers", "transformers"}
METHOD = sorted((PACKAGE / "method").rglob("*.py"))


def imported(path: Path, seen: set[Path]) -> set[str]:
    """Top-level names that a module imports, itself or through other modules of MIFO."""
    if path in seen:
        return set()
    seen.add(path)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in modules:
            names.add(module.split(".")[0])
            file = PACKAGE.parent / (module.replace(".", "/") + ".py")
            if module.startswith("mifo.") and file.is_file():
                names |= imported(file, seen)
    return names


@pytest.mark.parametrize("path", METHOD, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_method_imports_no_framework_and_no_other_room(path):
    seen: set[Path] = set()
    assert not imported(path, seen) & FOREIGN
    apart = {each for each in seen if not each.is_relative_to(PACKAGE / "method")}
    assert apart <= {PACKAGE / "errors.py"}


def test_each_walk_is_at_most_six_rooms_and_none_twice():
    """A mask to the loss, a box to attention, a loss weight to the gradient: along files that exist."""
    text = (PACKAGE.parent / "docs" / "design.md").read_text()
    section = text.split("## Three walks")[1].split("\n## ")[0]
    walks = [re.findall(r"`(\w+(?:/\w+)+\.py)`", each) for each in section.strip().split("\n\n")]
    assert len(walks) == 3
    for files in walks:
        assert all((PACKAGE / file).is_file() for file in files)
        rooms = [room for room, _ in groupby(file.split("/")[0] for file in files)]
        assert 1 < len(rooms) <= 6 and len({*rooms}) == len(rooms), rooms
