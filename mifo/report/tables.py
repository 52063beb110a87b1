"""Tables as Markdown and CSV in which text that a user or a stranger wrote stays text."""

import re
from pathlib import Path

import pandas as pd

from mifo.files import whole_file


def markdown_text(text: str) -> str:
    """`text` as one line of Markdown: no markup, no cell of a table, no HTML."""
    return re.sub(r"([\\`*|<\[\]])", r"\\\1", " ".join(text.split()))


def markdown_code(text: str) -> str:
    """`text` as one line of code, between more backticks than it holds."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}"


def markdown_table(frame: pd.DataFrame, bold: pd.DataFrame | None = None) -> list[str]:
    """The lines of a table. `bold`, of the same shape, is true where a cell stands out."""
    cells = frame.astype(str).map(markdown_text)
    if bold is not None:
        cells = cells.mask(bold, "**" + cells + "**")
    lines = [map(markdown_text, frame.columns), ["---"] * len(frame.columns), *cells.to_numpy()]
    return [f"| {' | '.join(line)} |" for line in lines]


def write_csv(path: Path, frame: pd.DataFrame, digits: int) -> None:
    """Write a table without its index; a text that a spreadsheet would compute begins with an apostrophe."""
    with whole_file(path) as unfinished:
        frame.map(_harmless).to_csv(
            unfinished, index=False, float_format=f"%.{digits}f", lineterminator="\r\n"
        )


def _harmless(value: object) -> object:
    return re.sub(r"^(?=[=+\-@\t\r])", "'", value) if isinstance(value, str) else value
