"""Files that are whole or not there, and the one way in which a file from outside is read.

A file or folder may come from a killed process, a full disk or a stranger. Every reader here gives the
content in plain Python types or raises `MifoError`: one sentence with the file's name. None executes
anything, waits for a pipe, or reads more than its limit.
"""

import csv
import errno
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from io import BufferedReader, StringIO
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from yaml import AliasEvent, SafeLoader, YAMLError

from mifo.errors import MifoError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# in which a run says what it is, what was typed for it, and how it ended
CONFIG, COMMAND, STATUS = "config.yaml", "command.json", "status.json"
WEIGHTS = Path(__file__).parent / "miniature" / "weights"  # of the embedded miniature
LOCKLESS = (errno.ENOLCK, errno.EOPNOTSUPP)  # errors of locks, on file systems that have none
MOST_TEXT = 64 * 2**20  # bytes of a JSON or YAML file; the largest record of a table is a tenth of that

T = TypeVar("T", bound="DataclassInstance")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; afterwards the file is flushed to disk and renamed to `path`.

    Overwrites an existing file; callers check first. A kill leaves `.NAME.unfinished`, an exception nothing.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        for written in (unfinished, *unfinished.rglob("*")):
            _flush(written)
        unfinished.replace(path)
    except BaseException:
        remove(unfinished)
        raise
    _flush(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As `whole_file`, for a new folder `path`; the next call removes what a kill left."""
    with whole_file(path) as unfinished:
        remove(unfinished)
        unfinished.mkdir(parents=True)
        yield unfinished


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` as UTF-8 by `whole_file`."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def check_entries(folder: Path) -> None:
    """Refuse pipes and devices below a folder, for which a library that reads the folder would wait."""
    for place, _, files in os.walk(folder):
        for path in (Path(place, name) for name in files):
            if path.exists() and not path.is_file():
                raise MifoError(f"{path} is no regular file; put a file there")


def check_room(folder: Path, needed: int) -> None:
    """Make `folder` if it is missing; refuse it if it cannot be written to or lacks `needed` free bytes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise MifoError(f"{folder} cannot be written to ({reason(error)}); choose another folder") from error
    if free < needed:
        raise MifoError(
            f"{folder} needs {needed / 2**30:.2f} GiB, but its disk has {free / 2**30:.2f} GiB free; "
            "make room or choose a folder on another disk"
        )


def existing_folder(key: str, given: Path | str, content: str) -> Path:
    """The folder that the setting `key` names, `~` expanded; it must be there, and should hold `content`."""
    folder = Path(given).expanduser()
    if os.path.isdir(folder):  # Path.is_dir raises where a name is too long or a parent closed
        return folder
    found = "is a file, not a folder" if os.path.exists(folder) else "is not a folder: nothing lies there"
    raise MifoError(f"{key}={folder} {found}; name the folder that holds {content}")


def refuse_existing(folder: Path | str) -> None:
    """Raise `MifoError` if `folder` exists already."""
    if Path(folder).exists():
        raise MifoError(
            f"{folder} exists already and is not replaced; choose another folder or move it away."
        )


@contextmanager
def regular_file(path: Path, limit: int | None = None) -> Iterator[BufferedReader]:
    """Open a regular file, or a link to one, to read its bytes, of which there may be at most `limit`.

    Raises:
        MifoError: the file is missing, no regular file (a folder, a pipe, a device), too large or unreadable,
            also where reading or decoding fails in the block.
    """
    try:
        # a pipe would wait for somebody who writes; a link to one too
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise MifoError(f"{path} is no regular file; put a file there")
            if limit is not None and state.st_size > limit:
                raise MifoError(f"{path} has {state.st_size} bytes, more than the {limit} that are read")
            yield file
    except (OSError, ValueError) as error:  # a decoding error is a ValueError, as is a name with a zero byte
        raise MifoError(f"{path} cannot be read ({reason(error)})") from error


def reason(error: Exception) -> str:
    """The message of an error, on one line, without the error number and file name of the system."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def read_text(path: Path) -> str:
    """The text of a regular file of at most `MOST_TEXT` bytes, as UTF-8 with or without a byte-order mark.

    Raises:
        MifoError: as `regular_file`, or the file is not UTF-8.
    """
    with regular_file(path, MOST_TEXT) as file:
        content = file.read(MOST_TEXT + 1)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise MifoError(f"{path} cannot be read (line {line} is not UTF-8; save it as UTF-8)") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file. NaN and infinity, which JSON does not have, are refused.

    Raises:
        MifoError: as `read_text`, or the file is not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text, parse_constant=finite_number, parse_float=finite_number)
    except (ValueError, RecursionError) as error:
        raise MifoError(f"{path} is damaged: it is not JSON ({error})") from error


def refuse_aliases(text: str, path: Path) -> None:
    """Refuse YAML, read from `path`, with aliases, which can multiply a few lines to gigabytes.

    Raises:
        MifoError: it holds one. YAMLError: it is not YAML.
    """
    loader = SafeLoader(text if "*" in text else "")  # most files have none, and are read once
    while loader.check_event():
        if isinstance(loader.get_event(), AliasEvent):
            raise MifoError(f"{path} holds a YAML alias (*name), which is not read; write the value out")


def read_yaml(path: Path, from_outside: bool = False) -> Any:
    """The content of a YAML file in plain types. Aliases are refused.

    Args:
        from_outside: the file may come from a stranger: ${…}, which could read the environment, is refused.

    Raises:
        MifoError: as `read_text`, or the file is not YAML.
    """
    # floats such as 1e-4 are numbers in OmegaConf's dialect, strings in plain YAML
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    text = read_text(path)
    try:
        refuse_aliases(text, path)
        content = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
    except (YAMLError, RecursionError, ValueError, OmegaConfBaseException) as error:
        raise MifoError(f"{path} is damaged: it is not YAML ({' '.join(str(error).split())})") from error
    if from_outside and "${" in repr(content):
        raise MifoError(f"{path} holds ${{…}}, which is not read; write the value out")
    return content


def read_csv(path: Path, columns: Mapping[str, Callable[[str], Any]]) -> list[dict[str, Any]]:
    """The rows of a CSV file, of which other columns than `columns` stay texts.

    Args:
        columns: those that must be there, and what makes a value of a cell's text. It raises ValueError with
            a few words where it cannot.

    Raises:
        MifoError: as `read_text`, or the file is no such table; it names the line and the column.
    """
    text = read_text(path)
    try:
        # pandas fills up rows that were cut off, and takes a quote that nobody closes
        heads, *rows = csv.reader(StringIO(text, newline=""), strict=True)
    except (csv.Error, ValueError) as error:
        raise MifoError(f"{path} is damaged: it is no table ({error})") from error
    if missing := [column for column in columns if column not in heads]:
        raise MifoError(f"{path} is damaged: it lacks the column {missing[0]}")
    if not text.endswith("\n") or any(len(row) != len(heads) for row in rows):
        raise MifoError(f"{path} is damaged: a row has more or fewer fields than the first line")
    found: list[dict[str, Any]] = [dict(zip(heads, row, strict=True)) for row in rows]
    for line, cells in enumerate(found, start=2):
        for column, value_of in columns.items():
            try:
                cells[column] = value_of(cells[column])
            except ValueError as error:
                raise MifoError(f"{path} is damaged: line {line}, {column}: {error}") from error
    return found


def read_record(path: Path, form: type[T]) -> T:
    """A JSON object as the dataclass `form`: its keys must be the fields, its values of their types.

    Fields with a default may be missing; a field may be a dataclass itself.

    Raises:
        MifoError: as `read_json`, or keys or types differ.
    """
    return as_record(read_json(path), form, path)


def as_record(content: Any, form: type[T], path: Path) -> T:
    """`content`, read from `path`, as the dataclass `form`; see `read_record`."""
    if not isinstance(content, dict):
        raise MifoError(f"{path} is damaged: it holds no object with keys")
    known = {field.name: field for field in fields(form)}
    if unknown := sorted(content.keys() - known.keys()):
        raise MifoError(f"{path} is damaged: it holds the unknown key {unknown[0][:40]!r}")
    for name, field in sorted(known.items()):
        if name not in content and field.default is MISSING and field.default_factory is MISSING:
            raise MifoError(f"{path} is damaged: it lacks the key {name}")
    kinds, values = get_type_hints(form), {}
    for name, value in content.items():
        try:
            values[name] = typed(value, kinds[name], path)
        except TypeError as error:
            raise MifoError(f"{path} is damaged: {name} holds {str(value)[:40]!r}") from error
    return form(**values)


def typed(value: Any, kind: Any, path: Path) -> Any:
    """A value of JSON, read from `path`, as the type `kind`.

    Args:
        kind: a plain type, a dataclass, a literal, a union, or a container of such.

    Raises:
        TypeError: the value is of another type.
        MifoError: see `as_record`.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        for each in inner:
            with suppress(TypeError):
                return typed(value, each, path)
    if isinstance(kind, type) and is_dataclass(kind):
        return as_record(value, kind, path)
    if origin in (list, tuple) and isinstance(value, list):
        return origin(typed(each, inner[0], path) for each in value)
    if origin is dict and isinstance(value, dict):
        return {key: typed(each, inner[1], path) for key, each in value.items()}
    if origin is Literal and type(value) is str and value in inner:
        return value
    plain = (int, float) if kind is float else kind
    if origin or not isinstance(value, plain) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    return value


def finite_number(text: str) -> float:
    """The number that a text is; a ValueError for others, also where 1e400 would become infinite."""
    with suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise ValueError(f"{text[:40]!r} is no finite number")


def checksum(path: Path) -> str:
    """The SHA-256 of a regular file in hexadecimals."""
    with regular_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_cache() -> Path:
    """MIFO's folder in the user's cache; whoever writes to it makes it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mifo"


def _flush(path: Path) -> None:
    """Wait until the disk holds a file's content, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
