"""How long `mifo results` takes on many runs: its first reading, then lists of known runs, start-up included.

    python scripts/results_speed.py 10000

Prints wall clock and processor time, least and median, of whole processes.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import yaml

from mifo.config.compose import as_plain, compose, settings_of
from mifo.metrics.scores import Evaluation, Evaluator, Score

TIMES = 10


def make_runs(folder: Path, count: int) -> None:
    """Folders of finished runs that differ in seed and score."""
    usual = as_plain(settings_of(compose("run", ["paths.output=unknown"])))
    usual.pop("seed")
    text = yaml.safe_dump(usual)
    for number in range(count):
        run = folder / "multirun" / "run" / f"sweep{number // 500}" / str(number % 500)
        run.mkdir(parents=True)
        status = {"status": "ok", "error": None, "overrides": [f"seed={number}"]}
        score = Score("leakage", number % 101 / 100, False, Evaluator("judge", "0" * 12), "miniature")
        (run / "config.yaml").write_text(f"seed: {number}\n{text}")
        (run / "status.json").write_text(json.dumps(status))
        (run / "scores.json").write_text(json.dumps(asdict(Evaluation((score,), ()))))


def seconds(folder: Path) -> tuple[float, float]:
    """Wall clock and processor time of one process that lists the runs."""
    command = [sys.executable, "-m", "mifo", "results", "method=mifo", "seed>100", "sort=leakage"]
    place = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": place}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(count: int) -> None:
    """Make the runs and print the figures."""
    with tempfile.TemporaryDirectory() as name:
        make_runs(Path(name), count)
        print(
            "{:,} runs, first reading: {:.1f} s, of a processor {:.1f} s".format(count, *seconds(Path(name)))
        )
        walls, own = zip(*(seconds(Path(name)) for _ in range(TIMES)), strict=True)
        for what, all_of in (("wall clock", walls), ("processor", own)):
            print(
                f"then {what}: least {min(all_of):.3f} s, median {statistics.median(all_of):.3f} s of {TIMES}"
            )


if __name__ == "__main__":
    main(int(sys.argv[1]))
