"""Records of the benchmark as JSON, and one Markdown table of all that lie in a folder."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from platform import processor, python_version

import pandas as pd
import torch

from mifo.benchmark.measuring import Measurement
from mifo.files import read_record, write_whole
from mifo.report.tables import markdown_table, markdown_text

PACKAGES = ("diffusers", "transformers", "lightning")
# what the published implementation needs on one H100, and the marks to reach: seconds, GiB (None: no figure)
MARKS = {
    "stage1_step": ("220 ms, 11.5 GiB", "18 ms"),
    "stage2_step": ("219 ms, 25.8 GiB", "45 ms"),
    "stage2_8bit": ("219 ms, 25.8 GiB", "14 GiB"),
    "both_stages": ("220 s", "30 s"),
    "picture": ("13.5 s, 13.2 GiB", "1.5 s, 5 GiB"),
    "three_pictures": ("27.3 s, 29.7 GiB", "3.5 s"),
    "demo": ("–", "120 s on two processor cores"),
    "throughput": ("–", "5 s a run"),
}
# names of the rows that say what an idea gains: "ROW with all ideas", "ROW without IDEA", and the first again
BASELINE, WITHOUT, AGAIN = "with all ideas", " without ", ", again"
LOW_VRAM_ROWS = ("stage1_step", "stage2_step", "picture")  # whose largest peak has a mark of its own
LOW_VRAM_MARK = "8 GiB"
HEADS = [
    *("row", "profile", "median", "spread", "samples", "peak memory", "TFLOP", "share of peak"),
    *("reference on an H100", "mark", "commit, date"),
]
IDEA_HEADS = [
    *("idea", "row", "profile", "with all ideas, before / after", "without it", "time it gains"),
    *("memory it gains", "commit, date"),
]


@dataclass(frozen=True)
class Circumstances:
    """Where, when and of what a record was taken; `commit` names the code, also where no git knows it."""

    device: str
    profile: str
    shapes: str
    date: str
    commit: str
    versions: dict[str, str]

    @classmethod
    def now(cls, device: torch.device, profile: str, shapes: str, code: str) -> "Circumstances":
        versions = {"python": python_version(), "torch": torch.__version__}
        versions |= {package: version(package) for package in PACKAGES}
        if device.type == "cuda":
            versions["cuda"] = str(torch.version.cuda)
        date = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(device_name(device), profile, shapes, date, code, versions)


@dataclass(frozen=True)
class Record(Circumstances):
    """What was measured, row by row."""

    rows: dict[str, Measurement]


def device_name(device: torch.device) -> str:
    """The GPU, or the processor and how many threads torch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else processor() or 'processor'}, {torch.get_num_threads()} threads"


def write_record(file: Path, circumstances: Circumstances, rows: dict[str, Measurement]) -> None:
    """Write what is measured so far; a row that failed holds its reason in `notes`."""
    record = asdict(Record(**asdict(circumstances), rows=rows))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def write_table(folder: Path) -> Path:
    """Write `folder/README.md`: of each machine, shapes and profile the newest of each row and each idea."""
    read = (read_record(file, Record) for file in folder.glob("*.json"))
    records = sorted(read, key=lambda record: record.date)
    newest = {
        (record.device, record.shapes, record.profile, name): (record, row)
        for record in records
        for name, row in record.rows.items()
        if BASELINE not in name and WITHOUT not in name
    }
    lines = ["# Benchmark", "", "Written by `mifo benchmark`; docs/performance.md says how to read it.", ""]
    if (folder / "tried.md").is_file():
        lines += ["[What was tried](tried.md) says what each idea was expected to gain.", ""]
    for machine in dict.fromkeys(key[:2] for key in newest):
        rows, notes, low_vram = [], [], []
        for (*where, profile, name), (record, row) in sorted(newest.items(), key=lambda item: item[0][3]):
            if tuple(where) != machine:
                continue
            comparable = record.shapes == "sd21" or name in ("demo", "throughput")
            reference, mark = MARKS.get(name, ("–", "–")) if comparable else ("–", "–")
            if comparable and profile == "low_vram" and name in LOW_VRAM_ROWS:
                mark = LOW_VRAM_MARK
                low_vram.append(row.peak_gib)
            rows.append(
                [
                    *(name, profile, _seconds(row.seconds)),
                    "–" if row.seconds is None else f"{_seconds(row.fastest)} – {_seconds(row.slowest)}",
                    *(str(row.samples or "–"), _number(row.peak_gib, "{:.1f} GiB")),
                    *(_number(row.tflop, "{:.3g}"), _number(row.share_of_peak, "{:.1%}")),
                    *(reference, mark, f"{record.commit}, {record.date[:10]}"),
                ]
            )
            notes += [
                f"- {markdown_text(f'{name}, {profile}: {key} = {_note(value)}')}"
                for key, value in row.notes.items()
            ]
        if low_vram and None not in low_vram:
            notes.append(
                f"- largest peak of low_vram: {max(filter(None, low_vram)):.1f} GiB, mark {LOW_VRAM_MARK}"
            )
        last = [record for record in records if (record.device, record.shapes) == machine][-1]
        versions = ", ".join(f"{name} {number}" for name, number in last.versions.items())
        lines += [f"## {markdown_text(machine[0])}, shapes of {markdown_text(machine[1])}", ""]
        lines += markdown_table(pd.DataFrame(rows, columns=HEADS))
        lines += ["", *notes, "", f"Newest record taken with {markdown_text(versions)}.", ""]
    lines += _ideas(records)
    table = folder / "README.md"
    write_whole(table, "\n".join(lines))
    return table


def _ideas(records: Sequence[Record]) -> list[str]:
    """What each idea gains: of each machine, shapes and profile its newest comparison, within one record."""
    newest: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        for name, row in record.rows.items():
            measure, found, idea = name.partition(WITHOUT)
            if not found:
                continue
            both = [record.rows.get(f"{measure} {BASELINE}{again}") for again in ("", AGAIN)]
            usual = [each for each in both if each and each.seconds is not None]
            where = f"{record.device}, shapes of {record.shapes}"
            newest[where, record.profile, measure, idea] = [
                idea,
                measure,
                record.profile,
                " / ".join(_seconds(each.seconds) for each in usual) or "–",
                str(row.notes.get("failed", _seconds(row.seconds))),
                _gain(row.seconds, [each.seconds for each in usual], _seconds, share=True),
                # on a processor the peak is that of the whole process, with all that came before
                _gain(row.peak_gib, [each.peak_gib for each in usual], "{:.1f} GiB".format)
                if "cuda" in record.versions
                else "–",
                f"{record.commit}, {record.date[:10]}",
            ]
    lines = []
    for where in dict.fromkeys(key[0] for key in newest):
        rows = [cells for key, cells in newest.items() if key[0] == where]
        lines += [f"## What each idea gains: {markdown_text(where)}", ""]
        lines += ["The first time was measured before and after the others, within one process.", ""]
        lines += [*markdown_table(pd.DataFrame(rows, columns=IDEA_HEADS)), ""]
    return lines


def _gain(
    without: float | None, usual: Sequence[float | None], told: Callable[[float], str], share: bool = False
) -> str:
    """What an idea gains; with `share`, also as a share of the time with all ideas."""
    known = [each for each in usual if each is not None]
    if without is None or not known:
        return "–"
    mean = sum(known) / len(known)
    gain, sign = without - mean, "−" if without < mean else "+"
    size = told(abs(gain))
    if size == told(0.0):
        return size
    return f"{sign}{size}" + (f" ({sign}{abs(gain) / mean:.0%})" if share else "")


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _note(value: float | int | bool | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
