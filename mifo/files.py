"""Files that are whole or not there."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it, so that a killed process leaves no half file under that name.

    What was there is replaced, so that the caller refuses what must stay. A kill leaves `.NAME.unfinished`.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
