"""Tables as Markdown and CSV in which text that a user or a stranger wrote stays text."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mifo.files import whole_file

if TYPE_CHECKING:  # a list of runs, which escapes texts, does not wait for it
    import pandas as pd


def markdown_text(text: str) -> str:
    """`text` as one line of Markdown: no markup, no cell of a table, no HTML."""
    return re.sub(r"([\\`*|<\[\]])", r"\\\1", " ".join(text.split()))


def markdown_code(text: str) -> str:
    """`text` as one line of code, between more backticks than it holds."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}"


def markdown_table(frame: "pd.DataFrame", bold: "pd.DataFrame | None" = None) -> list[str]:
    """The lines of a table. `bold`, of the same shape, is true where a cell stands out."""
    cells = frame.astype(str).map(markdown_text)
    if bold is not None:
        cells = cells.mask(bold, "**" + cells + "**")
    lines = [map(markdown_text, frame.columns), ["---"] * len(frame.columns), *cells.to_numpy()]
    return [f"| {' | '.join(line)} |" for line in lines]


def write_csv(path: Path, frame: "pd.DataFrame", digits: int) -> None:
    """Write a table without its index."""
    with whole_file(path) as unfinished:
        frame.map(spreadsheet_text).to_csv(
            unfinished, index=False, float_format=f"%.{digits}f", lineterminator="\r\n"
        )


def spreadsheet_text(value: object) -> object:
    """A cell of a CSV; before a text that a spreadsheet would compute stands an apostrophe."""
    return re.sub(r"^(?=[=+\-@\t\r])", "'", value) if isinstance(value, str) else value
