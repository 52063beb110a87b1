"""`mifo benchmark`: time and memory of learning and synthesis on this machine, row by row."""

import logging
import re
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf
from rich.progress import track

from mifo.acceleration.settings import PerformanceSettings
from mifo.benchmark.instead import check_instead, plan
from mifo.benchmark.measuring import Measurement
from mifo.benchmark.records import Circumstances, write_record, write_table
from mifo.benchmark.rows import ROWS, Bench
from mifo.commands.setup import prepare
from mifo.config.identity import told_code
from mifo.config.location import conf_folder
from mifo.config.schema import BenchmarkTaskSettings
from mifo.errors import MifoError, check_known

log = logging.getLogger(__name__)


def benchmark(settings: BenchmarkTaskSettings) -> Path:
    """Measure the wanted rows, each written as soon as it is known; returns the record's file.

    Raises:
        MifoError: a row that does not exist, or no row could be measured.
    """
    wanted = settings.benchmark.rows or list(ROWS)
    for name in wanted:
        check_known("benchmark.rows", name, ROWS)
    check_instead(settings.benchmark.instead)
    device = prepare(settings)
    bench = Bench(
        settings.benchmark,
        settings.performance,
        device,
        settings.model.dtype,
        settings.learning,
        settings.penalty,
        settings.origin.overrides,
    )
    profile = profile_and_changes(settings.performance)
    taken = Circumstances.now(device, profile, settings.benchmark.shapes, told_code())
    slug = re.sub(r"[^a-z0-9]+", "-", f"{taken.device} {taken.shapes} {taken.profile}".lower()).strip("-")
    folder = Path(settings.benchmark.folder)
    file = folder / f"{re.sub(r'[^0-9]', '', taken.date[:19])}-{slug}.json"
    rows: dict[str, Measurement] = {}
    planned = plan(wanted, settings.benchmark.instead)
    for name, (row, instead) in track(planned.items(), "benchmark", total=len(planned)):
        rows[name] = instead.measure(row, bench)
        if reason := rows[name].notes.get("failed"):
            log.warning("%s: %s", name, reason)
        write_record(file, taken, rows)
        table = write_table(folder)
    print(table.read_text())
    print(f"record: {file}")
    if all("failed" in row.notes for row in rows.values()):
        raise MifoError(f"no row could be measured; {file} says why.")
    return file


def profile_and_changes(performance: PerformanceSettings) -> str:
    """The profile's name, and the keys of it that were given other values: their rows are not its own."""
    file = conf_folder() / "performance" / f"{performance.name}.yaml"
    if not file.is_file():
        return performance.name
    said = OmegaConf.load(file)
    usual = asdict(PerformanceSettings(**said.get("performance", said)))
    values = asdict(performance).items()
    return ", ".join([performance.name, *(f"{key}={value}" for key, value in values if value != usual[key])])
