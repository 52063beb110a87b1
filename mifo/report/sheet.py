"""The contact sheet in both of its forms."""

from pathlib import Path

from mifo.errors import MifoError
from mifo.report.content import Sheet
from mifo.report.html import sheet_html
from mifo.report.png import draw_sheet


def write_sheet(folder: Path | str, sheet: Sheet) -> tuple[Path, Path]:
    """Write `contact_sheet.png` and `contact_sheet.html` into `folder` and return their paths.

    Raises MifoError when one of them is there already.
    """
    folder = Path(folder)
    png, html = folder / "contact_sheet.png", folder / "contact_sheet.html"
    for path in (png, html):
        if path.exists():
            raise MifoError(f"{path} already exists: choose another output folder.")
    folder.mkdir(parents=True, exist_ok=True)
    draw_sheet(sheet).save(png)
    html.write_text(sheet_html(sheet), encoding="utf-8")
    return png, html
