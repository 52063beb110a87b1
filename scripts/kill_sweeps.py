"""Kill jobs of sweeps and sweeps themselves at random moments, give them again, and count what was done.

    python scripts/kill_sweeps.py --runs 500 --jobs 16 --seconds 540

So many sweeps as `--jobs` says ask for the same runs at the same time, each in an order of its own, half of
them in one common folder. Every job is a forked process, as a launcher would start it: it goes on when its
sweep is killed. After the last kill, as many sweeps ask undisturbed for a part of the runs each. The exit
code is 1 if anything was found:

    twice      a run has two results, or its scores were measured twice
    lost       a run without a result, though the last sweeps ended
    half       a run counts as done whose result is not whole
    bits       a result differs from that of an undisturbed run (of `--samples` runs)
    number     a folder holds what Hydra recorded of another run
    trace      a traceback was printed
    stuck      one of the last sweeps does not end, or ends with an error

`--seconds` ends the kills; the last sweeps and the comparison come after them.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml
from kill_runs import prepare, start, wait

SIGNALS = [signal.SIGKILL] * 2 + [signal.SIGTERM]


def count_scores(log: Path) -> None:
    """Let every job say which run's scores it has saved."""
    from mifo.metrics.evaluation import Evaluation

    save = Evaluation.save

    def saved(evaluation: Evaluation, path: Path) -> None:
        save(evaluation, path)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, f"{run_of(Path(path).parent)}\n".encode())
        os.close(handle)

    Evaluation.save = saved


def fork_jobs(pids: Path) -> None:
    """Let Hydra's launcher make every job in a process of its own, whose id is a file in `pids`."""
    from hydra.core.plugins import Plugins
    from hydra.core.utils import JobReturn, JobStatus

    name = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    launcher = Plugins.instance().class_name_to_class[name].launch.__globals__
    run_job = launcher["run_job"]

    def forked(*arguments: object, **others: object) -> JobReturn:
        if not (pid := os.fork()):
            code = 1
            try:
                os.setpgid(0, 0)  # a sweep that is killed leaves its job alone
                (pids / str(os.getpid())).touch()
                run_job(*arguments, **others)
                code = 0
            except BaseException as error:
                code = getattr(error, "code", 1)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)
        os.waitpid(pid, 0)
        (pids / str(pid)).unlink(missing_ok=True)
        return JobReturn(status=JobStatus.COMPLETED, _return_value=None)

    launcher["run_job"] = forked


def run_of(folder: Path) -> str:
    """What tells the runs of the sweep apart."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    return f"{len(settings['penalty']['terms'])} terms, seed {settings['seed']}"


def result(folder: Path) -> dict[str, str]:
    """Hash of each file of a run's result."""
    found = {}
    for file in sorted(
        [*folder.glob("learned/*.safetensors"), *folder.glob("pictures/*.png"), folder / "scores.json"]
    ):
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else "missing"
    return found


def is_whole(folder: Path) -> bool:
    """Whether scores, pictures and what was learned can be read."""
    from mifo.backbones.learned import read_learned
    from mifo.data.saved_pictures import read_pictures
    from mifo.errors import MifoError
    from mifo.metrics.evaluation import Evaluation

    try:
        pictures = read_pictures(folder / "pictures")
        read_learned(folder / "learned")
        return len(Evaluation.read(folder / "scores.json").pictures) == len(pictures) > 0
    except MifoError:
        return False


class Harness:
    """The sweeps, what is killed of them, and what they leave."""

    def __init__(self, folder: Path, runs: int, seed: int) -> None:
        from kill_runs import Harness as Commands

        self.folder, self.choose = folder, random.Random(seed)
        self.commands = Commands(folder / "prepared", folder / "prepared-other")
        self.seeds, self.runs = [*range((runs + 1) // 2)], 2 * ((runs + 1) // 2)
        self.place, self.pids = folder / "sweeps", folder / "pids"
        for each in (self.place, self.pids):
            each.mkdir()
        self.log = folder / "scored.log"
        count_scores(self.log)
        fork_jobs(self.pids)
        self.kills = Counter()

    def sweep(self, number: int, seeds: list[int] | None = None, place: Path | None = None) -> int:
        """Start a sweep over all runs in an order of its own; returns its process id."""
        seeds = self.choose.sample(self.seeds, len(self.seeds)) if seeds is None else seeds
        penalties = self.choose.sample(["mifo", "none"], 2)
        order = [f"seed={','.join(map(str, seeds))}", f"penalty={','.join(penalties)}"]
        asked = [each for each in self.commands.commands["run"][1:] if not each.startswith("hydra.run.dir")]
        common = ["hydra.sweep.dir=common"] if number % 2 else []
        place = place or self.place
        return start(
            ["run", "-m", *asked, "logger=none", *self.choose.sample(order, 2), *common], place, place / "tmp"
        )

    def disturb(self, sweeps: int, every: float, until: float) -> None:
        """Keep so many sweeps running and kill at random until a sweep of all runs has ended, or in time."""
        running = {number: self.sweep(number) for number in range(sweeps)}
        while time.monotonic() < until:
            time.sleep(self.choose.uniform(0.5, 1.5) * every / sweeps)
            for number, pid in list(running.items()):
                code = wait(pid, 0)
                if code == 0:
                    print(f"a sweep of all runs ended after {self.kills.total()} kills", flush=True)
                    running.pop(number)
                    until = 0
                elif code is not None:
                    running[number] = self.sweep(number)
            jobs = [int(file.name) for file in self.pids.iterdir()]
            if until == 0:
                break
            is_job = self.choose.random() < 0.85
            if is_job and not jobs:
                continue
            chosen = self.choose.choice(jobs if is_job else [*running.values()])
            try:
                os.kill(chosen, self.choose.choice(SIGNALS))
                self.kills["jobs" if is_job else "sweeps"] += 1
            except ProcessLookupError:
                pass
            (self.pids / str(chosen)).unlink(missing_ok=True)
        for pid in running.values():
            os.kill(pid, signal.SIGKILL)
            wait(pid, 60)
            self.kills["sweeps"] += 1

    def judge(self, samples: int) -> list[tuple[str, str]]:
        """What is wrong after the last sweeps."""
        found = []
        done: dict[str, list[Path]] = {}
        for status in self.place.rglob("status.json"):
            folder = status.parent
            if (folder / "config.yaml").is_file():
                run = run_of(folder)
                typed = json.loads((folder / "command.json").read_text())["overrides"]
                if f"seed {next(each[5:] for each in typed if each.startswith('seed='))}" not in run:
                    found.append(("number", f"{folder}: {run}"))
                if json.loads(status.read_text())["status"] == "ok":
                    done.setdefault(run, []).append(folder)
                    if not is_whole(folder):
                        found.append(("half", f"{folder}: {run}"))
        found += [("lost", f"{self.runs - len(done)} runs")] * (self.runs - len(done))
        found += [("twice", f"{run}: {folders}") for run, folders in done.items() if len(folders) > 1]
        scored = Counter(self.log.read_text().splitlines())
        found += [("twice", f"the scores of {run}") for run, times in scored.items() if times > 1]
        text = Path(f"{self.place}.stderr").read_text(errors="replace")
        found += [("trace", line) for line in text.splitlines() if line.startswith("Traceback")]
        seeds = self.choose.sample(self.seeds, min(samples, len(self.seeds)))
        again = self.folder / "again"
        again.mkdir()
        if seeds and wait(self.sweep(1, seeds, again), 600) != 0:
            found.append(("stuck", "the undisturbed sweep"))
        for folder in again.glob("common/[0-9]*"):
            other = done.get(run_of(folder), [None])[0]
            if other is None or result(other) != result(folder):
                found.append(("bits", f"{folder} and {other}"))
        return found


def main() -> int:
    """Run the harness; returns 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=500, help="of each sweep, an even number")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="sweeps at the same time")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which nothing is killed")
    parser.add_argument("--every", type=float, default=4.0, help="seconds between two kills in a sweep")
    parser.add_argument("--samples", type=int, default=3, help="seeds whose runs are compared bit by bit")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kill_sweeps-"))
    prepare()
    harness = Harness(folder, given.runs, given.seed)
    gc.freeze()
    print(f"{folder}: ready after {time.monotonic() - began:.0f} s", flush=True)
    harness.disturb(given.jobs, given.every, time.monotonic() + given.seconds)
    print(
        f"after {time.monotonic() - began:.0f} s: killed {dict(harness.kills)}; the last sweeps begin",
        flush=True,
    )
    parts = [harness.seeds[number :: given.jobs] for number in range(given.jobs)]
    last = [harness.sweep(number, part) for number, part in enumerate(parts) if part]
    codes = [wait(pid, 1200) for pid in last]
    found = [("stuck", f"a last sweep: exit code {code}") for code in codes if code != 0]
    found += harness.judge(given.samples)
    for kind, what in found[:50]:
        print(f"{kind}: {what}")
    counts = Counter(kind for kind, _ in found)
    kinds = ("twice", "lost", "half", "bits", "number", "trace", "stuck")
    told = ", ".join(f"{kind} {counts[kind]}" for kind in kinds)
    kills = f"{harness.kills['jobs']} jobs and {harness.kills['sweeps']} sweeps killed"
    print(f"{harness.runs} runs, {kills}, {time.monotonic() - began:.0f} s: {told}")
    if not found:
        shutil.rmtree(folder)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
