"""A table as CSV, Markdown, LaTeX and a plot."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from glob import escape
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd

from mifo.errors import MifoError
from mifo.files import read_json, whole_file, write_whole
from mifo.metrics.evaluation import best_of, titled
from mifo.report.tables import markdown_code, markdown_table, markdown_text, write_csv
from mifo.tables.collect import Cells, Measured, cells, differences, measured, partial_cells
from mifo.tables.execute import Done
from mifo.tables.pages import draw_pages
from mifo.tables.plan import Run
from mifo.tables.plot import draw_table
from mifo.tables.record import RUNS, Entry, write_record
from mifo.tables.settings import TableSettings

_HOW = {"workers", "per_job", "code", "missing", "runs", "record", "results", "pages", "send"}
MOST = 20  # runs without a result that a table names
QUESTION = "question.json"
NOUNS = {"table": "table", "tune": "tuning"}


def claim_results(folder: Path, settings: Any, overrides: Sequence[str], task: str = "table") -> None:
    """Record what a table or a tuning asks in `folder`, which must be empty or hold one that asks the same.

    Args:
        settings: a `TableSettings` or `TuningSettings`. task: table | tune.

    Raises:
        MifoError: the folder holds results that ask something else.
    """
    asked = {key: value for key, value in asdict(settings).items() if key not in _HOW}
    if not settings.only:  # which records of earlier versions do not name
        del asked["only"]
    asked["overrides"] = list(overrides)
    path = folder / QUESTION
    if path.exists() and not _is_asked(path, asked, task):
        raise MifoError(
            f"{folder} holds a {NOUNS[task]} of other runs; choose another folder by {task}.results=FOLDER"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asked, indent=2, ensure_ascii=False) + "\n")


def newest_results(name: str) -> Path | None:
    """The folder in which the table `name` was written last, unless another one was chosen for it."""
    written = Path("outputs/tables").glob(f"{escape(name)}-{'[0-9a-f]' * 6}/table.md")
    newest = max(written, key=lambda path: path.stat().st_mtime, default=None)
    return newest and newest.parent


def _is_asked(path: Path, asked: dict[str, Any], task: str) -> bool:
    """Whether a recorded question is `asked`, as a torn one counts where no results belong to it."""
    try:
        known = read_json(path)
        if "trials" in asked and isinstance(known, dict) and known.get("trials") in range(asked["trials"]):
            known["trials"] = asked["trials"]  # more of them begin with the same
        return known == asked
    except MifoError as error:
        if path.is_file() and not (path.parent / RUNS).exists():
            return True
        raise MifoError(
            f"{error}; delete it if the results beside it belong to this {NOUNS[task]}, or choose another "
            f"folder by {task}.results=FOLDER"
        ) from error


def write_table(folder: Path, command: str, settings: TableSettings, ended: Sequence[Done]) -> str:
    """Write the record, `table.{csv,md,tex,png,pdf}` and `pictures-SET.jpg`; returns the Markdown.

    Raises:
        MifoError: no run is finished, or the runs were not measured in the same way.
    """
    finished = [done for done in ended if done.is_finished]
    entries = [(done.run, done.entry()) for done in finished]
    if not entries:
        if settings.missing == "leave":
            raise MifoError("no run of the table is finished yet; make them without table.missing=leave")
        raise MifoError("no run of the table is finished; the reasons stand above and in each run's log.txt")
    runs = measured(entries)
    known = {metric for run in runs for metric in run.values}
    columns = [column for column in dict.fromkeys(settings.columns) if column in known]
    if not columns:
        raise MifoError(f"none of table.columns was measured; take some of {', '.join(sorted(known))}")
    found = cells(runs, columns)
    write_record(folder, entries)
    _write_estimates(folder / "table.csv", found)
    pages: dict[str, str] = {}
    for scenes, page in draw_pages(finished, runs, columns, settings.pages, settings.title).items():
        plain = f"pictures-{re.sub(r'[^A-Za-z0-9]+', '-', scenes)}"
        names = (f"{plain}{'' if number == 1 else f'-{number}'}.jpg" for number in count(1))
        pages[scenes] = next(name for name in names if name not in pages.values())
        with whole_file(folder / pages[scenes]) as unfinished:
            page.save(unfinished, "JPEG", quality=80)
    failed = [done for done in ended if not done.is_finished]
    markdown = _markdown(command, settings, entries, failed, runs, columns, found, pages)
    write_whole(folder / "table.md", markdown)
    write_whole(folder / "table.tex", _latex(settings.title, found, columns))
    figure = draw_table(found, columns, settings.plot, settings.title)
    for form in ("png", "pdf"):
        with whole_file(folder / f"table.{form}") as unfinished:
            figure.savefig(unfinished, format=form)
    return markdown


def _write_estimates(path: Path, found: Cells) -> None:
    rows = [
        (row, scenes, metric, each.mean, each.half, each.count, each.runs)
        for (row, scenes), estimates in found.items()
        for metric, each in estimates.items()
    ]
    heads = ["row", "scenes", "metric", "mean", "half_width_95", "values", "runs"]
    write_csv(path, pd.DataFrame(rows, columns=heads), digits=6)


def _markdown(
    command: str,
    settings: TableSettings,
    entries: Sequence[tuple[Run, Entry]],
    failed: Sequence[Done],
    runs: Sequence[Measured],
    columns: Sequence[str],
    found: Cells,
    pages: Mapping[str, str],
) -> str:
    codes = Counter(str(entry.code or "unknown") for _, entry in entries)
    minutes = round(sum(entry.minutes for _, entry in entries), 2)
    scores = [score for _, entry in entries for score in entry.scores]
    evaluators = markdown_text(", ".join(sorted({f"{each.evaluator} ({each.protocol})" for each in scores})))
    lines = [
        f"# {markdown_text(settings.title)}",
        "",
        markdown_code(command),
        "",
        f"{len(entries)} of {len(entries) + len(failed)} runs, {minutes} minutes, "
        f"{datetime.now(UTC):%Y-%m-%d}; "
        f"code {', '.join(f'{code} × {count}' for code, count in codes.items())}; measured by {evaluators}.",
        "Mean ± half of the 95 % interval (Student's t) over scenes, whose seeds are averaged first, or over "
        "seeds where there is one scene: n of them. Bold: the best of each set of scenes, of rows with the "
        "most scenes.",
        "",
        *_markdown_table(found, columns, bold=True),
    ]
    first = runs[0].row
    if paired := differences(runs, columns, first):
        lines += ["", f"Minus *{markdown_text(first)}*, paired by scene and seed:", ""]
        lines += _markdown_table(paired, columns)
    if failed:
        lines += ["", "Without a result:", ""]
        lines += [f"- {markdown_text(f'{done.run}: {done.error}')}" for done in failed[:MOST]]
        lines += [f"- and {len(failed) - MOST} more"] if len(failed) > MOST else []
    lines += ["", "![The table as a plot](table.png)", ""]
    lines += [
        f"![Pictures of {markdown_text(scenes)}, a row for each row of the table]({file})\n"
        for scenes, file in pages.items()
    ]
    return "\n".join(lines)


def _markdown_table(found: Cells, columns: Sequence[str], bold: bool = False) -> list[str]:
    rows = [
        [
            *(row, scenes, *(str(estimates.get(column, "–")) for column in columns)),
            *(
                str(max((getattr(each, of) for each in estimates.values()), default=0))
                for of in ("count", "runs")
            ),
        ]
        for (row, scenes), estimates in found.items()
    ]
    heads = ["row", "scenes", *map(titled, columns), "n", "runs"]
    best = _best(found, columns) if bold else set()
    marks = [[(*cell, column) in best for column in ("", "", *columns, "", "")] for cell in found]
    return markdown_table(pd.DataFrame(rows, columns=heads), pd.DataFrame(marks, columns=heads))


def _latex(title: str, found: Cells, columns: Sequence[str]) -> str:
    """A `booktabs` table."""
    best = _best(found, columns)
    heads = [titled(c).replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$") for c in columns]
    rows = []
    for (row, scenes), estimates in found.items():
        shown = []
        for column in columns:
            each = estimates.get(column)
            mean = "--" if each is None else f"{each.mean:.3f}"
            mean = rf"\mathbf{{{mean}}}" if (row, scenes, column) in best else mean
            half = "" if each is None or each.half is None else rf" \pm {each.half:.3f}"
            shown.append(f"${mean}{half}$")
        rows.append([row, scenes, *shown])
    labels = ["", "scenes"]
    styled = pd.DataFrame(rows, columns=[*labels, *heads]).style.hide(axis="index")
    written = styled.format(escape="latex", subset=labels).to_latex(
        hrules=True, column_format=f"ll{'c' * len(columns)}"
    )
    return f"% {title}\n" + written.replace("α", r"$\alpha$")


def _best(found: Cells, columns: Sequence[str]) -> set[tuple[str, str, str]]:
    """(row, scenes, metric) of the best mean of each set of scenes with several rows; see `partial_cells`."""
    best, partial = set(), partial_cells(found)
    for scenes in {scenes for _, scenes in found}:
        for column in columns:
            own = {
                row: each[column].mean for (row, of), each in found.items() if of == scenes and column in each
            }
            if len(own) > 1:
                whole = {row: mean for row, mean in own.items() if (row, scenes, column) not in partial}
                choose = {"max": max, "min": min}[best_of(column)]
                best.add((choose(whole, key=whole.__getitem__), scenes, column))
    return best
