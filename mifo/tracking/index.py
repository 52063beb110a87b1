"""Every run on disk and all of its settings and scores, read once and kept in an index in the user's cache.

The index is SQLite, from which a list reads its columns alone. It can be deleted at any time: the next list
makes it again. Of libraries only YAML is imported, also by the readers that are called, so that a list of
10,000 runs takes a moment.
"""

import json
import logging
import os
import sqlite3
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from mifo.errors import MifoError
from mifo.files import CONFIG, STATUS, read_json, read_text, refuse_aliases, typed, user_cache
from mifo.metrics.scores import SCORES, Evaluation

log = logging.getLogger(__name__)

_VERSION = 2  # of the tables below; an index of another version is made again
_MOST_KEYS = 5000  # of one run: a file from a stranger must not fill the disk
_TABLES = """
    CREATE TABLE runs (id INTEGER PRIMARY KEY, folder TEXT UNIQUE, stamp INTEGER);
    CREATE TABLE facts (key TEXT, run INTEGER, value, PRIMARY KEY (key, run)) WITHOUT ROWID;
    CREATE INDEX of_run ON facts (run);
"""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Index:
    """The runs below some folders, as they are now.

    Args:
        folders: which are searched for folders of runs; a folder of a run is one with `status.json`.
    """

    def __init__(self, folders: Sequence[Path] = (Path("outputs"), Path("multirun"))) -> None:
        self._database = _opened(user_cache() / "results.sqlite")
        self.runs: dict[str, int] = {}  # folder → number
        try:
            self._refresh([os.path.abspath(folder) for folder in folders])
        except sqlite3.Error:  # damaged, or no room for it: this once without
            self._database = _opened(None)
            self._refresh([os.path.abspath(folder) for folder in folders])

    def column(self, key: str, runs: Sequence[int] | None = None) -> dict[int, Any]:
        """The values of a key by the number of the run, of all or of some; runs without it are left out."""
        if runs is None or len(runs) > 500:
            return dict(self._database.execute("SELECT run, value FROM facts WHERE key = ?", [key]))
        one = "SELECT run, value FROM facts WHERE key = ? AND run = ?"
        return dict(row for run in runs for row in self._database.execute(one, [key, run]))

    def has(self, key: str) -> bool:
        """Whether any of the runs has the key."""
        own = {*self.runs.values()}
        return any(
            run in own for (run,) in self._database.execute("SELECT run FROM facts WHERE key = ?", [key])
        )

    def keys(self) -> list[str]:
        """The keys that any of the runs has."""
        # SQLite would otherwise look at every fact
        step = "SELECT min(key) FROM facts WHERE key > ?"
        found = [""]
        while (following := self._database.execute(step, found[-1:]).fetchone()[0]) is not None:
            found.append(following)
        return [key for key in found[1:] if self.has(key)]

    def _refresh(self, folders: Sequence[str]) -> None:
        """Read what is new or changed below the folders, and forget what is gone."""
        rows = self._database.execute("SELECT folder, stamp, id FROM runs").fetchall()
        numbers = {folder: number for folder, _, number in rows}
        found: dict[str, int] = {}
        for folder in folders:
            _search(folder, numbers, found)
        below = tuple(f"{folder.rstrip(os.sep)}{os.sep}" for folder in folders)
        missing = numbers.keys() - found.keys()
        gone = [folder for folder in missing if f"{folder}{os.sep}".startswith(below)]
        changed = dict(found.items() - {(folder, stamp) for folder, stamp, _ in rows})
        if gone or changed:
            with self._database:
                for folder in (*gone, *(changed.keys() & numbers)):
                    self._database.execute("DELETE FROM facts WHERE run = ?", [numbers[folder]])
                    self._database.execute("DELETE FROM runs WHERE id = ?", [numbers[folder]])
                for folder, stamp in changed.items():
                    if not os.path.exists(f"{folder}/{CONFIG}"):
                        stamp = 0  # a run that begins writes its status first; it is read again
                    insert = "INSERT INTO runs (folder, stamp) VALUES (?, ?)"
                    numbers[folder] = self._database.execute(insert, [folder, stamp]).lastrowid
                    facts = ((key, numbers[folder], value) for key, value in read_facts(Path(folder)).items())
                    self._database.executemany("INSERT INTO facts VALUES (?, ?, ?)", facts)
        self.runs = {folder: numbers[folder] for folder in found}


def near(folder: str) -> str:
    """A folder as seen from the working folder, where it lies below."""
    return folder.removeprefix(f"{Path.cwd()}/")


def read_facts(folder: Path) -> dict[str, Any]:
    """What a run's files say, flat: its settings, where it comes from, its status and its scores.

    Where a file cannot be read, `status` is `damaged`, and `error` names the file.
    """
    facts: dict[str, Any] = {"folder": str(folder)}
    damage: dict[str, Any] = {}
    for name, read in ((CONFIG, _settings), (STATUS, _status), (SCORES, _scores)):
        if (folder / name).exists():
            try:
                facts |= islice(read(folder / name), _MOST_KEYS)
            except (MifoError, yaml.YAMLError, ValueError, TypeError, KeyError, RecursionError):
                damage = {"status": "damaged", "error": f"{name} is damaged"}
    return facts | damage


def _settings(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    refuse_aliases(text, path)
    content = typed(yaml.load(text, _LOADER), dict[str, Any], path)
    origin = content.pop("origin", {})
    return flat({**content, **origin})


def _status(path: Path) -> Iterator[tuple[str, Any]]:
    content = typed(read_json(path), dict[str, Any], path)
    yield from flat({key: content.get(key) for key in ("status", "error")})


def _scores(path: Path) -> Iterator[tuple[str, Any]]:
    yield from ((score.metric, score.value) for score in Evaluation.read(path).scores)


def flat(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values that SQLite holds; lists as JSON. A ValueError for half a letter of UTF-16."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from flat(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        yield key, json.dumps(node, default=str)[:1000]
    elif isinstance(node, bool):
        yield key, str(node).lower()
    elif isinstance(node, int | float | str):
        f"{key}{node}".encode()
        yield key, node if not isinstance(node, int) or abs(node) < 2**63 else str(node)


def _search(folder: str, known: Container[str], found: dict[str, int]) -> None:
    """Add the runs below a folder, with the time at which their status was last written, to `found`."""
    try:
        folder.encode()  # a byte that is no UTF-8 is no text to SQLite
        entries = [*os.scandir(folder)]
    except UnicodeEncodeError:
        log.warning("The folder %a is left out, since its name is no text; rename it.", folder)
        return
    except OSError:
        return
    for entry in entries:
        if entry.name == STATUS:
            found[folder] = entry.stat().st_mtime_ns
            return
    for entry in entries:  # links lead to runs that are found in their own place
        if entry.name[0] != "." and entry.is_dir(follow_symlinks=False):
            if entry.path in known:
                try:
                    found[entry.path] = os.stat(f"{entry.path}/{STATUS}").st_mtime_ns
                    continue
                except OSError:
                    pass  # a run no longer
            _search(entry.path, known, found)


def _opened(path: Path | None) -> sqlite3.Connection:
    """The index at `path`, made anew where it is not one of this version; in memory where that fails too."""
    for place in [path, path] if path else []:
        with suppress(OSError, sqlite3.Error):
            place.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(place, timeout=10)
            database.execute("PRAGMA synchronous = OFF")  # what a power cut damages is made again
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version == _VERSION:
                return database
            if version == 0 and not database.execute("SELECT name FROM sqlite_master").fetchone():
                database.executescript(
                    f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {_VERSION}; COMMIT;"
                )
                return database
        with suppress(OSError):
            place.unlink(missing_ok=True)
    database = sqlite3.connect(":memory:")
    database.executescript(_TABLES)
    return database
