"""The floors of the house: a room imports rooms below it alone, and no two files import each other."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mifo"


def floors() -> list[str]:
    """The rooms in the table of docs/design.md, from the ground up."""
    text = (ROOT / "docs" / "design.md").read_text()
    table = text.split("| floor |")[1].split("\n\n")[0]
    return re.findall(r"`mifo/(\w+)(?:/|\.py)`", table)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path) -> Iterator[str]:
    """The modules of the package that a file imports, also within functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("mifo"))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mifo":
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "mifo"


def test_every_room_has_a_floor():
    rooms = {room(module) for module in modules()} - {"mifo", "__main__"}
    assert rooms == set(floors())


def test_imports_run_downward():
    order = floors()
    upward = [
        f"{name} imports {other}"
        for name, file in modules().items()
        for other in imports(file)
        if {room(name), room(other)} <= set(order) and order.index(room(other)) > order.index(room(name))
    ]
    assert not upward


def test_no_files_import_each_other():
    known = modules()
    arrows = {
        name: {other for other in imports(file) if other in known and other != name}
        for name, file in known.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in arrows[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in known:
        visit(name, ())


def test_configurations_name_only_rooms_below_the_commands():
    allowed = set(floors()[: floors().index("config") + 1])
    for file in (ROOT / "conf").rglob("*.yaml"):
        for target in re.findall(r"_target_: (mifo[\w.]+)", file.read_text()):
            assert room(target) in allowed, f"{file} names {target}"
            yaml.safe_load(file.read_text())


def test_the_method_is_torch_alone():
    """It imports nothing of mifo but itself and the error, and no library but torch."""
    for file in (PACKAGE / "errors.py", *(PACKAGE / "method").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top in ("torch", "mifo") or top in sys.stdlib_module_names, (file, name)
                assert top != "mifo" or name == "mifo.errors" or name.startswith("mifo.method"), (file, name)


def test_settings_need_no_torch():
    """Files of settings import no torch nor what does, so that help and composition start at once."""
    heavy = {
        "torch",
        "numpy",
        "lightning",
        "diffusers",
        "transformers",
        "wandb",
        "matplotlib",
        "pandas",
        "PIL",
    }
    for name, file in modules().items():
        if name.endswith("settings") or name == "mifo.config.schema":
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom | ast.Import):
                    names = (
                        [node.module or ""]
                        if isinstance(node, ast.ImportFrom)
                        else [a.name for a in node.names]
                    )
                    assert not heavy & {each.split(".")[0] for each in names}, file


WORDS_OF_ONE_FAMILY = re.compile(r"\bunet\b|\battn[12]\b|\bto_[qkv]\b|</w>|down_blocks|up_blocks|mid_block")


def test_only_backbones_know_a_model_family():
    rooms = ("method", "data", "training", "making", "metrics", "callbacks", "commands")
    for name in rooms:
        for file in (PACKAGE / name).rglob("*.py"):
            found = WORDS_OF_ONE_FAMILY.search(file.read_text())
            assert not found, f"{file} says {found[0]}"
