"""A table as CSV, Markdown, LaTeX and a plot."""

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from mifo.errors import MifoError
from mifo.metrics.evaluation import METRICS
from mifo.tables.collect import Estimate, Measured, cells, differences, measured
from mifo.tables.execute import Done
from mifo.tables.pages import draw_pages
from mifo.tables.plan import Run
from mifo.tables.plot import draw_table, name
from mifo.tables.record import Entry, write_record
from mifo.tables.settings import TableSettings

_HOW = {"workers", "code", "missing", "runs", "record", "results", "pages"}
MOST = 20  # runs without a result that a table names
QUESTION = "question.json"


def claim_results(folder: Path, settings: TableSettings, overrides: Sequence[str]) -> None:
    """Record what the table asks in `folder`, which must be empty or hold a table that asks the same.

    Raises:
        MifoError: the folder holds a table that asks something else.
    """
    asked = {key: value for key, value in asdict(settings).items() if key not in _HOW}
    asked["overrides"] = list(overrides)
    text = json.dumps(asked, indent=2, ensure_ascii=False) + "\n"
    path = folder / QUESTION
    if path.is_file() and path.read_text() != text:
        raise MifoError(
            f"{folder} holds a table of other runs; choose another folder by table.results=FOLDER"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


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
    columns = [column for column in settings.columns if any(column in run.values for run in runs)]
    found = cells(runs, columns)
    write_record(folder, entries)
    _write_estimates(folder / "table.csv", found)
    pages = {}
    for scenes, page in draw_pages(finished, runs, columns, settings.pages, settings.title).items():
        pages[scenes] = f"pictures-{re.sub(r'[^A-Za-z0-9]+', '-', scenes)}.jpg"
        page.save(folder / pages[scenes], quality=80)
    failed = [done for done in ended if not done.is_finished]
    markdown = _markdown(command, settings, entries, failed, runs, columns, found, pages)
    (folder / "table.md").write_text(markdown)
    (folder / "table.tex").write_text(_latex(settings.title, found, columns))
    figure = draw_table(found, columns, settings.plot, settings.title)
    for form in ("png", "pdf"):
        figure.savefig(folder / f"table.{form}")
    return markdown


def _write_estimates(path: Path, found: Mapping[tuple[str, str], Mapping[str, Estimate]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "scenes", "metric", "mean", "half_width_95", "values", "runs"])
        for (row, scenes), estimates in found.items():
            for metric, each in estimates.items():
                half = "" if each.half is None else f"{each.half:.6f}"
                writer.writerow([row, scenes, metric, f"{each.mean:.6f}", half, each.count, each.runs])


def _markdown(
    command: str,
    settings: TableSettings,
    entries: Sequence[tuple[Run, Entry]],
    failed: Sequence[Done],
    runs: Sequence[Measured],
    columns: Sequence[str],
    found: Mapping[tuple[str, str], Mapping[str, Estimate]],
    pages: Mapping[str, str],
) -> str:
    codes = Counter(str(entry.code or "unknown") for _, entry in entries)
    minutes = round(sum(entry.minutes for _, entry in entries), 2)
    scores = [score for _, entry in entries for score in entry.scores]
    evaluators = ", ".join(sorted({f"{score.evaluator} ({score.protocol})" for score in scores}))
    lines = [
        f"# {settings.title}",
        "",
        f"`{command}`",
        "",
        f"{len(entries)} of {len(entries) + len(failed)} runs, {minutes} minutes, "
        f"{datetime.now(UTC):%Y-%m-%d}; "
        f"code {', '.join(f'{code} × {count}' for code, count in codes.items())}; measured by {evaluators}.",
        "Mean ± half of the 95 % interval (Student's t) over scenes, whose seeds are averaged first, or over "
        "seeds where there is one scene: n of them. The best of each set of scenes is bold.",
        "",
        *_markdown_table(found, columns, bold=True),
    ]
    first = runs[0].row
    if paired := differences(runs, columns, first):
        lines += ["", f"Minus *{first}*, paired by scene and seed:", "", *_markdown_table(paired, columns)]
    if failed:
        lines += ["", "Without a result:", "", *(f"- {done.run}: {done.error}" for done in failed[:MOST])]
        lines += [f"- and {len(failed) - MOST} more"] if len(failed) > MOST else []
    lines += ["", "![The table as a plot](table.png)", ""]
    lines += [
        f"![Pictures of {scenes}, a row for each row of the table]({file})\n"
        for scenes, file in pages.items()
    ]
    return "\n".join(lines)


def _markdown_table(
    found: Mapping[tuple[str, str], Mapping[str, Estimate]], columns: Sequence[str], bold: bool = False
) -> list[str]:
    best = _best(found, columns) if bold else set()
    lines = [
        f"| row | scenes | {' | '.join(name(column) for column in columns)} | n | runs |",
        f"| --- | --- | {' | '.join('---' for _ in columns)} | --- | --- |",
    ]
    for (row, scenes), estimates in found.items():
        shown = [
            f"**{estimates[column]}**" if (row, scenes, column) in best else str(estimates.get(column, "–"))
            for column in columns
        ]
        behind = [max(getattr(each, of) for each in estimates.values()) for of in ("count", "runs")]
        lines.append(f"| {row} | {scenes} | {' | '.join([*shown, *map(str, behind)])} |")
    return lines


def _latex(
    title: str, found: Mapping[tuple[str, str], Mapping[str, Estimate]], columns: Sequence[str]
) -> str:
    """A `booktabs` table."""
    best = _best(found, columns)
    arrows = {True: r"$\uparrow$", False: r"$\downarrow$"}
    heads = [f"{_tex(c.replace('_', ' '))} {arrows[METRICS[c].higher_is_better]}" for c in columns]
    lines = [
        rf"% {title}",
        rf"\begin{{tabular}}{{ll{'c' * len(columns)}}}",
        r"\toprule",
        " & ".join(["", "scenes", *heads]) + r" \\",
        r"\midrule",
    ]
    for (row, scenes), estimates in found.items():
        shown = []
        for column in columns:
            each = estimates.get(column)
            mean = "--" if each is None else f"{each.mean:.3f}"
            mean = rf"\mathbf{{{mean}}}" if (row, scenes, column) in best else mean
            half = "" if each is None or each.half is None else rf" \pm {each.half:.3f}"
            shown.append(f"${mean}{half}$")
        lines.append(" & ".join([_tex(row), _tex(scenes), *shown]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _best(
    found: Mapping[tuple[str, str], Mapping[str, Estimate]], columns: Sequence[str]
) -> set[tuple[str, str, str]]:
    """(row, scenes, metric) of the best mean of each set of scenes with several rows."""
    best = set()
    for scenes in {scenes for _, scenes in found}:
        for column in columns:
            means = {
                row: each[column].mean
                for (row, own), each in found.items()
                if own == scenes and column in each
            }
            if len(means) > 1:
                choose = max if METRICS[column].higher_is_better else min
                best.add((choose(means, key=means.get), scenes, column))
    return best


def _tex(text: str) -> str:
    for character, replacement in (("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("α", r"$\alpha$")):
        text = text.replace(character, replacement)
    return text
