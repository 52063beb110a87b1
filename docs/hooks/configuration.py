"""The site's page of every command, key and option, made from the schema and the first lines of conf/."""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mifo.config.location import conf_folder
from mifo.config.schema import SCHEMAS, TaskSettings
from mifo.tables.settings import TableSettings

FIRST = """# Every key and option

`mifo COMMAND KEY=VALUE` sets a key, `mifo COMMAND GROUP=OPTION` chooses an option of a group. An option may
set other values than the defaults below: `mifo run --cfg job` prints those of a run. This page is made from
the code when the site is built.
"""


@cache
def comments(owner: type) -> dict[str, str]:
    """What the comments beside and above the fields of a dataclass say."""
    source = textwrap.dedent(inspect.getsource(owner))
    said: dict[int, tuple[bool, str]] = {}  # line → whether the comment stands alone, and its text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            said[token.start[0]] = (token.line.lstrip().startswith("#"), token.string.lstrip("# "))
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign):
            above = node.lineno
            while said.get(above - 1, (False,))[0]:
                above -= 1
            lines = range(above, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(said[line][1] for line in lines if line in said)  # type: ignore
    return found


def said_of(owner: type, name: str) -> str:
    """The comment on a field, which a class may inherit."""
    return next(
        said[name] for base in owner.__mro__ if is_dataclass(base) and name in (said := comments(base))
    )


def meaning(owner: type, name: str, kind: Any) -> str:
    """The comment on a field, and the values of a choice."""
    choices = " | ".join(kind) if isinstance(kind, type) and issubclass(kind, StrEnum) else ""
    return " ".join(part for part in (said_of(owner, name), choices) if part)


def section_of(kind: Any) -> tuple[type, bool] | None:
    """The dataclass that a field holds, and whether it holds several by name."""
    for each in (kind, *get_args(kind)):
        if isinstance(each, type) and is_dataclass(each):
            return each, getattr(kind, "__origin__", None) is dict
    return None


def sections(path: str, owner: type, value: Any) -> Iterator[tuple[str, type, Any]]:
    """A dataclass and those below it: the path of the keys, the class, and an object with the defaults.

    Without `origin`, which MIFO fills in itself.
    """
    yield path, owner, value
    kinds = get_type_hints(owner)
    for field in fields(owner):
        if field.name != "origin" and (inner := section_of(kinds[field.name])):
            below, several = inner
            own = getattr(value, field.name, None)
            yield from sections(
                f"{path}{field.name}." + "NAME." * several, below, own if not several else None
            )


def default(field: Any, value: Any) -> str:
    """The default of a key as it is typed."""
    if value is not None:
        found = getattr(value, field.name)
    else:
        found = field.default if field.default_factory is MISSING else field.default_factory()
    if found is MISSING or found == "???":
        return "must be given"
    if found is None or isinstance(found, bool):
        return f"`{ {None: 'null', True: 'true', False: 'false'}[found] }`"
    return f"`{found}`" if str(found) else "empty"


def plain(text: str) -> str:
    """A comment as Markdown that shows the comment's letters; what stands in backticks stays code."""
    for python, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{python}\b", yaml, text)
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([\\*_{}\[\]|])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)) + "\n"


def keys(path: str, owner: type, value: Any, without: type | None = None) -> str:
    """The table of the keys of a section that are no sections.

    Args:
        without: a class whose keys are left out.
    """
    kinds = get_type_hints(owner)
    left = {"task", "origin"} | ({field.name for field in fields(without)} if without else set())
    rows = [
        (f"`{path}{field.name}`", default(field, value), plain(meaning(owner, field.name, kinds[field.name])))
        for field in fields(owner)
        if field.name not in left and not section_of(kinds[field.name])
    ]
    return table(("key", "default", "meaning"), rows) if rows else ""


def first_line(file: Path) -> str:
    """What the first comment of an option says."""
    lines = (line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    return plain(next(line for line in lines if not line.startswith("@package")))


def configuration() -> str:
    """The page, as Markdown."""
    conf = conf_folder()
    commands = []
    found: dict[str, tuple[type, Any, list[str]]] = {}
    own = []
    for task, schema in SCHEMAS.items():
        made = schema(task=task)
        _, *below = sections("", schema, made)
        for path, owner, value in below:
            found.setdefault(path, (owner, value, []))[2].append(task)
        tops = [f"`{path[:-1]}`" for path, *_ in below if path.count(".") == 1 and path != "paths."]
        commands.append(
            (f"`mifo {task}`", first_line(conf / f"{task}.yaml").partition(": ")[2], ", ".join(tops))
        )
        rows = keys("", schema, made, TaskSettings)
        if rows and "__annotations__" in schema.__dict__:  # else the command takes what another one takes
            own.append(f"### mifo {task}\n\n{rows}")
    parts = [FIRST, "## Commands\n", table(("command", "what it does", "its sections"), commands)]
    parts += [
        "## Keys of every command\n",
        keys("", TaskSettings, TaskSettings()),
        "## Keys of one command\n",
        *own,
    ]
    parts.append("## Sections\n")
    for path, (owner, value, tasks) in found.items():
        said = plain(" ".join(inspect.cleandoc(owner.__doc__ or "").replace("``", "`").split()))
        of = ", ".join(f"`mifo {task}`" for task in tasks)
        if len(tasks) == len(SCHEMAS):
            of = "every command"
        parts.append(f"### {path[:-1]}\n\n{said} Taken by {of}.\n\n{keys(path, owner, value)}")
    parts += [
        "## A table's file\n",
        plain(" ".join(inspect.cleandoc(TableSettings.__doc__ or "").split())) + "\n",
    ]
    parts += [keys("table.", TableSettings, TableSettings()), "## Groups and their options\n"]
    for folder in sorted({file.parent for file in conf.rglob("*.yaml")} - {conf}):
        group = folder.relative_to(conf).as_posix()
        options = [(f"`{group}={file.stem}`", first_line(file)) for file in sorted(folder.glob("*.yaml"))]
        parts.append(f"### {group}\n\n{table(('option', 'what it is'), options)}")
    return "\n".join(parts)


def on_files(files: Any, config: Any) -> Any:
    """Add the page to the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "configuration.md", content=configuration()))
    return files
