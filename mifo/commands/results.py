"""`mifo results`: every run on disk, filtered and sorted by any setting or score."""

import csv
import json
import operator
import re
import sys
from collections.abc import Callable, Sequence
from os.path import isdir  # false also for what is too long to be a path
from pathlib import Path
from typing import Any

import yaml

from mifo.errors import MifoError, check_known, nearest
from mifo.files import STATUS
from mifo.report.tables import spreadsheet_text
from mifo.tracking.index import Index, near, read_facts

HELP = """usage: mifo results [FOLDER ...] [KEY=VALUE | 'KEY>VALUE' ...] [sort=KEY] [columns=[KEY, ...]]
                    [limit=N] [format=table|csv|json]
       mifo results diff RUN RUN    the settings and scores in which two runs differ
       mifo results show RUN        open a run's contact sheet

  mifo results                                              the runs of outputs/ and multirun/
  mifo results method=mifo 'penalty.terms.penalty.weight>0.01' sort=leakage 'columns=[seed,leakage]'
  mifo results choices.penalty=none,reward 'status!=ok'     either of two values; all but one
  mifo results table=methods sort=-editability format=csv > runs.csv

A KEY is a setting (see mifo run --help), a score, status, folder, or where a run comes from:
choices.GROUP, overrides, sweep, table, row, set, code, dirty. Operators are = != < <= > >=; fractions
are equal where a list shows them alike, in four digits.
sort=-KEY begins with the largest. A table shows limit=40 runs, CSV and JSON all; limit=0 is no limit."""

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_FILTER = re.compile(r"([\w.@/-]+?)(!=|<=|>=|==?|<|>)(.*)", re.DOTALL)
_SCORES = ("editability", "instance_consistency", "identification", "leakage")
_COLUMNS = ("status", "choices.method", "choices.penalty", "instances.name", "seed", *_SCORES)
_UNTOLD = re.compile(r"folder|paths\..*|logger\..*|callbacks\..*|pid|host|group|overrides")


def results(arguments: Sequence[str]) -> None:
    """Print the list of runs, or do what `diff` or `show` asks.

    Raises:
        MifoError: an argument that is no filter, a key that no run has, or a folder without runs.
    """
    if {"-h", "--help"} & {*arguments}:
        print(HELP)
    elif arguments[:1] == ["diff"] and len(arguments) == 3:
        _diff(*arguments[1:])
    elif arguments[:1] == ["show"] and len(arguments) == 2:
        _show(arguments[1])
    elif arguments[:1] in (["diff"], ["show"]):
        raise MifoError("mifo results diff takes two folders of runs, mifo results show one")
    else:
        _list(arguments)


def _list(arguments: Sequence[str]) -> None:
    folders = [Path(text).expanduser() for text in arguments if not _FILTER.fullmatch(text) or isdir(text)]
    if missing := [folder for folder in folders if not isdir(folder)]:
        raise MifoError(f"{missing[0]} is no folder and no filter such as seed=1; see mifo results --help")
    filters: list[tuple[str, str, str]] = []
    options: dict[str, Any] = {"sort": "", "columns": None, "limit": None, "format": "table"}
    for argument in arguments:
        match = _FILTER.fullmatch(argument)
        if match is None or isdir(argument):
            continue
        key, sign, text = match.groups()
        if key in options and sign in ("=", "=="):
            options[key] = _value(key, text) if text else options[key]
        else:
            filters.append((key, sign, text))
    check_known("format", options["format"], ("table", "csv", "json"))
    index = Index(folders) if folders else Index()
    runs = _chosen(index, filters, str(options["sort"]))
    columns = options["columns"] or [key for key in _COLUMNS if index.has(key)]
    if not isinstance(columns, list):
        columns = [columns]
    limit = options["limit"] if options["limit"] is not None else 40 * (options["format"] == "table")
    if not isinstance(limit, int) or limit < 0:
        raise MifoError(f"limit={limit} is no number of runs; take a whole number, 0 for all")
    shown = runs[:limit] if limit else runs
    numbers = [index.runs[folder] for folder in shown]
    values = [_known(index, str(key), numbers) for key in columns]
    rows = [
        [folder, *(column.get(number) for column in values)]
        for folder, number in zip(map(near, shown), numbers, strict=True)
    ]
    _print(["folder", *map(str, columns)], rows, options["format"])
    if options["format"] == "table":
        print(f"{len(shown)} of {len(runs)} runs{'; limit=0 shows all' * (len(shown) < len(runs))}")


def _chosen(index: Index, filters: Sequence[tuple[str, str, str]], sort: str) -> list[str]:
    """The folders of the runs that pass all filters, sorted, or by their folders."""
    runs = index.runs
    for key, sign, text in filters:
        values, compare = _known(index, key), _OPERATORS[sign]
        # a label may hold a comma, which else parts several values
        wanted = [text] if text in values.values() else [_value(key, each) for each in text.split(",")]
        if sign[0] in "<>" and not all(isinstance(each, int | float) for each in wanted):
            raise MifoError(f"{key}{sign}{text} compares with no number; give one, as '{key}{sign}0.5'")
        every = all if sign == "!=" else any
        runs = {
            folder: number
            for folder, number in runs.items()
            if every(_compared(compare, values.get(number), each) for each in wanted)
        }
    if not sort:
        return sorted(runs)
    values = _known(index, sort.lstrip("-"))
    have = [folder for folder, number in runs.items() if number in values]
    order = sorted(have, key=lambda folder: _rank(values[runs[folder]]), reverse=sort.startswith("-"))
    return [*order, *(folder for folder in runs if runs[folder] not in values)]


def _compared(compare: Callable[[Any, Any], bool], value: Any, wanted: Any) -> bool:
    """Whether a value passes; what is of another kind, or missing, is unlike everything."""
    if isinstance(value, str) != isinstance(wanted, str):
        value, wanted = (None, None) if value is None else (str(value), str(wanted))
    if value is None:
        return compare is operator.ne
    if isinstance(value, float) and isinstance(wanted, int | float) and _told(value) == _told(float(wanted)):
        value = wanted  # a list shows them alike
    return compare(value, wanted)


def _rank(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value


def _value(key: str, text: str) -> Any:
    """A value as YAML reads it; true and false are kept as words."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MifoError(f"{key}={text} cannot be read; quote it once more") from error
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d+", text):
        return float(text)  # which YAML takes for a word where it has no dot
    return str(value).lower() if isinstance(value, bool) else value


def _column(index: Index, key: str, runs: Sequence[int] | None) -> dict[int, Any]:
    """The values of a key; the status of what seems to run is looked up, since it may have died."""
    values = index.column(key, runs)
    if key == "status":
        folders = {number: folder for folder, number in index.runs.items()}
        for number in [
            number for number, status in values.items() if status == "running" and number in folders
        ]:
            from mifo.config.jobs import state_of

            values[number] = state_of(Path(folders[number]))
    return values


def _known(index: Index, key: str, runs: Sequence[int] | None = None) -> dict[int, Any]:
    """The values of a key that some run has. Raises MifoError for another one."""
    if key == "folder":
        return {number: folder for folder, number in index.runs.items()}
    if index.has(key):
        return _column(index, key, runs)
    keys = index.keys()
    if not keys:
        raise MifoError("there are no runs in these folders; name the folders that hold some")
    ending = [each for each in keys if each.endswith(f".{key}")]
    hint = f"did you mean {ending[0]}? Or " if ending else nearest(key, keys)
    raise MifoError(f"no run has the key {key}; {hint}see mifo results --help")


def _print(heads: list[str], rows: list[list[Any]], form: str) -> None:
    if form == "csv":
        csv.writer(sys.stdout).writerows([map(spreadsheet_text, row) for row in [heads, *rows]])
    elif form == "json":
        print(json.dumps([dict(zip(heads, row, strict=True)) for row in rows], indent=1))
    else:
        # rich draws tables too, but takes as long for it as all else together
        cells = [[head.removeprefix("choices.") for head in heads]]
        cells += [[_told(value) for value in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["─" * width for width in widths])
        for row in cells:
            print("  ".join(map(str.ljust, row, widths)).rstrip())


def _told(value: Any) -> str:
    return (
        "–" if value is None else f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    )


def _facts(given: str) -> dict[str, Any]:
    folder = Path(given).expanduser()
    if not (folder / STATUS).is_file():
        raise MifoError(f"{folder} holds no run; name a folder that mifo results lists")
    return read_facts(folder)


def _diff(one: str, other: str) -> None:
    facts = [_facts(one), _facts(other)]
    keys = [key for key in sorted({*facts[0], *facts[1]}) if not _UNTOLD.fullmatch(key)]
    rows = [[key, *(each.get(key) for each in facts)] for key in keys]
    different = [row for row in rows if row[1] != row[2]]
    if different:
        _print(["key", one, other], different, "table")
    else:
        print("the two runs have the same settings and scores")


def _show(given: str) -> None:
    facts, sheet = _facts(given), Path(given).expanduser() / "contact_sheet.html"
    _print(
        ["key", "value"],
        [[key, value] for key, value in facts.items() if key in (*_COLUMNS, "folder", "error")],
        "table",
    )
    if not sheet.is_file():
        raise MifoError(f"{given} has no contact sheet; sheet=true makes one")
    import webbrowser  # late, since a list needs none

    print(f"contact sheet: {sheet}")
    webbrowser.open(sheet.absolute().as_uri())
