"""The contact sheet in both of its forms."""

from pathlib import Path

from mifo.errors import MifoError
from mifo.files import whole_file, write_whole
from mifo.report.content import Sheet
from mifo.report.html import sheet_html
from mifo.report.png import draw_sheet


def write_sheet(folder: Path | str, sheet: Sheet) -> tuple[Path, Path]:
    """Write `contact_sheet.png` and `contact_sheet.html` into `folder` and return their paths.

    The page is written last and at once: a picture without it was left by an interrupted run and is replaced.

    Raises MifoError when the page is there already.
    """
    folder = Path(folder)
    png, html = folder / "contact_sheet.png", folder / "contact_sheet.html"
    if html.exists():
        raise MifoError(f"{html} already exists: choose another output folder.")
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(png) as unfinished:
        draw_sheet(sheet).save(unfinished, "PNG")
    write_whole(html, sheet_html(sheet))
    return png, html
