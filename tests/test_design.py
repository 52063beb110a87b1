"""The design page's borders: the mathematics knows no framework."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mifo"
FRAMEWORKS = {"hydra", "omegaconf", "lightning", "wandb"}
PURE = ("attention", "penalty", "diffusion", "guidance", "shapes", "prompts", "synthesis")


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


@pytest.mark.parametrize(
    "path",
    [path for folder in PURE for path in (PACKAGE / folder).rglob("*.py")]
    + [PACKAGE / "learning" / "objective.py"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_the_mathematics_imports_no_framework(path):
    assert not imported(path, set()) & FRAMEWORKS
