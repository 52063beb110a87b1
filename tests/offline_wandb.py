"""Reading what an offline Weights & Biases run would send: records in LevelDB's log format."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FILE_HEADER, RECORD_HEADER = 32768, 7, 7
FULL, LAST = 1, 4


@dataclass
class OfflineRun:
    """One run: what it is called, its settings, its last values and how it ended."""

    id: str = ""
    steps: list[int] = field(default_factory=list)  # of the history
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: tuple[str, ...] = ()
    config: dict = field(default_factory=dict)
    history: dict = field(default_factory=dict)  # the last value of each name
    metrics: dict[str, str] = field(default_factory=dict)  # name → which values the summary keeps
    artifacts: dict[str, dict[str, dict[str, Path]]] = field(default_factory=dict)  # type → name → files
    aliases: dict[str, list[str]] = field(default_factory=dict)  # of an artifact, by its name
    exit_code: int | None = None
    files: Path = Path()


def read_offline_run(folder: Path) -> OfflineRun:
    """Read `offline-run-…/run-….wandb`, whose end wandb's service may write a moment after `finish`."""
    until = time.monotonic() + 20
    while (run := _read(folder)).exit_code is None and time.monotonic() < until:
        time.sleep(0.1)
    return run


def _read(folder: Path) -> OfflineRun:
    (path,) = folder.glob("*.wandb")
    run = OfflineRun(files=folder / "files")
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.name, run.group, run.job_type, run.tags = (
                record.run.run_id,
                record.run.display_name,
                record.run.run_group,
                record.run.job_type,
                tuple(record.run.tags),
            )
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            run.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            run.steps.append(record.history.step.num)
            for item in record.history.item:
                run.history["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        elif kind == "metric":
            kept = record.metric.summary
            run.metrics[record.metric.name] = "max" if kept.max else "min" if kept.min else ""
        elif kind in ("artifact", "request") and (sent := _artifact(record)):
            files = {entry.path: Path(entry.local_path) for entry in sent.manifest.contents}
            run.artifacts.setdefault(sent.type, {})[sent.name] = files
            run.aliases[sent.name] = list(sent.aliases)
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _artifact(record: Record):
    if record.HasField("artifact"):
        return record.artifact
    return record.request.log_artifact.artifact if record.request.HasField("log_artifact") else None


def _records(data: bytes) -> Iterator[Record]:
    place, parts = FILE_HEADER, b""
    while place + RECORD_HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < RECORD_HEADER:  # the rest of a block is padding
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        place += RECORD_HEADER
        parts += data[place : place + length]
        place += length
        if kind in (FULL, LAST):
            yield Record.FromString(parts)
            parts = b""
