"""Kill real commands at random moments, or fill their disk, go on with them, and compare the results' bits.

    python scripts/kill_runs.py --kills 500 --jobs 8           # signals: SIGKILL, SIGTERM, SIGHUP
    python scripts/kill_runs.py --full-disks 100 --jobs 8      # a file system that is full at some write

Python and PyTorch are imported once; every command is `mifo.cli.main` in a forked process on a tiny random
pipeline, with every second temporary folder on another file system. The exit code is 1 if anything was found:

    stuck      the command could not be ended by going on with it
    bits       the result differs from that of an undisturbed run
    half       a result that was not finished stood under the name of a finished one
    trace      a traceback was printed
    status     `status.json` is damaged, or says "running" after a signal that a process can answer
    rubbish    files of an interrupted attempt are left beside the finished result
"""

import argparse
import atexit
import contextlib
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

LONGEST = 120  # seconds of one command before it counts as stuck
SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM] * 2 + [signal.SIGHUP]
TINY = [
    *("device=cpu", "model=local", "learning.semantic.steps=3", "learning.finetuning.steps=2"),
    *("learning.semantic.checkpoint_every=1", "learning.finetuning.checkpoint_every=1"),
    *(
        "learning.prior.pictures=2",
        "learning.prior.steps=2",
        "learning.prior.cache=cache",
        "penalty.reward_steps=1",
    ),
    *("trainer.log_every_n_steps=1",),
]
SYNTHESIS = ["synthesis.steps=2", "synthesis.samples=1", "guidance.guided_steps=1", "guidance.iterations=1"]
TWO_PROMPTS = ["layout.endings=['in the snow','on the beach']"]


@dataclass
class Finding:
    """One violation: its kind, what was done, and the folder that shows it."""

    kind: str
    case: str
    folder: str
    detail: str


@dataclass
class Outcome:
    """What one case saw."""

    disturbed: int = 0
    attempts: int = 0
    findings: list[Finding] = field(default_factory=list)


def prepare() -> None:
    """Import everything that the commands import, and put the tests' evaluator in place of a large one."""
    import tqdm
    from tiny import MeanColour

    import mifo.commands.run  # noqa: F401
    from mifo.metrics.evaluation import PictureEvaluator

    tqdm.tqdm.monitor_interval = 0  # a thread, of which a forked process would know half
    PictureEvaluator.from_settings = lambda settings, device: PictureEvaluator(MeanColour(), MeanColour())


def call(arguments: list[str]) -> int:
    """The exit code of a command in this process, as the interpreter would give it."""
    import mifo.cli

    sys.argv = ["mifo", *arguments]
    try:
        mifo.cli.main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def start(arguments: list[str], place: Path, temporary: Path, largest: int | None = None) -> int:
    """Fork a command that works in `place`; returns its process id, which is that of its group.

    Args:
        largest: bytes of the largest file that it can write; None: any.
    """
    temporary.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.chdir(place)
        for number, name in ((1, "stdout"), (2, "stderr")):
            handle = os.open(f"{place}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ["TMPDIR"] = str(temporary)
        tempfile.tempdir = None
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
        atexit._clear()
        code = call(arguments)
        atexit._run_exitfuncs()
        if not code and place.parent.name == "undisturbed":
            Path(f"{place}.modules").write_text("\n".join(sys.modules))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    """The exit code (negative: a signal) of a process that ends within `seconds`, else None."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def end(pid: int) -> None:
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def results(place: Path) -> dict[str, str]:
    """Hash of each result in `place/run`, without the names of folders that differ from case to case."""
    run = place / "run"
    files = [
        *run.glob("learned/**/*"),
        *run.glob("pictures/*"),
        *run.glob("scores.json"),
        *run.glob("*sheet.*"),
        *run.glob("table.csv"),
    ]
    found = {}
    for file in sorted(file for file in files if file.is_file()):
        content = file.read_bytes().replace(str(place).encode(), b"PLACE")
        found[str(file.relative_to(run))] = hashlib.sha256(content).hexdigest()[:16]
    return found


class Harness:
    """The commands, what each of them gives undisturbed, and how long it takes."""

    def __init__(self, folder: Path, other: Path) -> None:
        from PIL import Image
        from tiny import tiny_pipeline

        self.folder, self.other = folder, other
        source = tiny_pipeline(folder / "pipeline")
        photo = folder / "photo"
        photo.mkdir()
        noise = random.Random(0).randbytes(32 * 32 * 3)
        Image.frombytes("RGB", (32, 32), noise).save(photo / "img.png")
        for number, box in enumerate([(2, 4, 14, 20), (16, 10, 30, 30)]):
            mask = Image.new("L", (32, 32))
            mask.paste(255, box)
            mask.save(photo / f"mask{number}.png")
        own = [f"model.source={source}", f"instances.folder={photo}", "instances=local"]
        own += ["instances.class_names=[car,cat]", "instances.initializers=[car,null]"]
        learn = [*TINY, *own, "hydra.run.dir=run"]
        self.commands = {
            "learn": ["learn", *learn],
            "run": ["run", *learn, *SYNTHESIS, *TWO_PROMPTS],
        }
        self.expected: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.measure("learn")
        self.measure("run")
        before = folder / "undisturbed"
        model = [*TINY[:2], own[0], "hydra.run.dir=run"]
        self.commands["synthesize"] = [
            *("synthesize", f"learned={before / 'learn' / 'run'}", *model, *SYNTHESIS, *TWO_PROMPTS)
        ]
        self.measure("synthesize")
        self.commands["evaluate"] = [
            *(
                "evaluate",
                f"pictures={before / 'run' / 'run' / 'pictures'}",
                "device=cpu",
                "hydra.run.dir=run",
            )
        ]
        self.measure("evaluate")

    def measure(self, name: str) -> None:
        """Run a command undisturbed in a forked process; its result is what every other must equal."""
        place = self.folder / "undisturbed" / name
        place.mkdir(parents=True)
        code = wait(start(self.commands[name], place, place / "tmp"), 600)
        self.expected[name] = results(place)
        if code != 0 or not self.expected[name]:
            print(Path(f"{place}.stderr").read_text(), file=sys.stderr)
            raise SystemExit(f"mifo {name} does not run undisturbed (exit code {code})")
        for module in Path(f"{place}.modules").read_text().splitlines():
            with contextlib.suppress(Exception):  # what it imported is imported once, for all
                importlib.import_module(module)
        again = self.folder / "measured" / name
        again.mkdir(parents=True)
        began = time.monotonic()
        wait(start(self.commands[name], again, again / "tmp"), 600)
        self.seconds[name] = time.monotonic() - began
        if results(again) != self.expected[name]:
            raise SystemExit(f"mifo {name} gives other bits the second time, undisturbed; see {self.folder}")

    def check_fork(self, name: str) -> list[Finding]:
        """Whether a process that imports everything anew gives the same bits."""
        place = self.folder / "process" / name
        place.mkdir(parents=True)
        command = [sys.executable, __file__, "--process", *self.commands[name]]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        if done.returncode == 0 and results(place) == self.expected[name]:
            return []
        return [Finding("bits", f"{name} in a process of its own", str(place), done.stderr[-300:])]

    def kill_case(self, seed: int) -> Outcome:
        """Start a command, end it by signals once to three times, and go on until it is done."""
        choose = random.Random(seed)
        name = choose.choices([*self.commands], weights=[4, 4, 2, 1])[0]
        place = self.folder / "cases" / f"{seed:06d}-{name}"
        place.mkdir(parents=True)
        temporary = (self.other if seed % 2 else self.folder) / f"tmp-{seed:06d}"
        outcome = Outcome()
        story = []
        for _ in range(choose.randint(1, 3)):
            number = choose.choice(SIGNALS)
            delay = choose.uniform(0, 1.1 * self.seconds[name])
            arguments = self.command(name, place, choose)
            pid = start(arguments, place, temporary)
            outcome.attempts += 1
            story.append(f"{' '.join(arguments[:2])} {signal.Signals(number).name} after {delay:.3f} s")
            if wait(pid, delay) is not None:
                break
            (os.killpg if number == signal.SIGKILL else os.kill)(pid, number)
            outcome.disturbed += 1
            code = wait(pid, LONGEST)
            if code is None:
                end(pid)
                outcome.findings.append(self.finding("stuck", story, place, "does not end by a signal"))
            self.inspect(name, place, story, outcome, answered=number != signal.SIGKILL and code != -number)
        self.finish(name, place, temporary, choose, story, outcome)
        return outcome

    def disk_case(self, seed: int) -> Outcome:
        """Start a command on a disk with too little room, make room, and go on until it is done."""
        choose = random.Random(seed)
        name = choose.choices([*self.commands], weights=[4, 4, 2, 1])[0]
        place = self.folder / "cases" / f"{seed:06d}-{name}"
        place.mkdir(parents=True)
        outcome = Outcome()
        room = int(choose.uniform(4, 1500)) * 1024
        mounted = os.geteuid() == 0 and mount(place, room)
        largest = None if mounted else int(2 ** choose.uniform(6, 19))
        story = [f"{room // 1024} KiB of room" if mounted else f"files of at most {largest} bytes"]
        try:
            temporary = self.other / f"tmp-{seed:06d}" if seed % 2 else place / "tmp"
            pid = start(self.command(name, place, choose), place, temporary, largest)
            outcome.attempts += 1
            code = wait(pid, LONGEST)
            if code is None:
                end(pid)
                outcome.findings.append(self.finding("stuck", story, place, "does not end"))
            outcome.disturbed += code != 0
            self.inspect(name, place, story, outcome, answered=not mounted)
            if mounted:
                remount(place)
            self.finish(name, place, temporary, choose, story, outcome)
        finally:
            if mounted:
                if outcome.findings:
                    shutil.copytree(place, f"{place}-kept", dirs_exist_ok=True)
                subprocess.run(["umount", "-l", place], check=False)
        return outcome

    def command(self, name: str, place: Path, choose: random.Random) -> list[str]:
        """The command as it was typed first, or `resume=` where there is something to go on with."""
        if (place / "run" / "command.json").is_file() and choose.random() < 0.5:
            return [self.commands[name][0], "resume=run"]
        return self.commands[name]

    def inspect(
        self, name: str, place: Path, story: list[str], outcome: Outcome, answered: bool, last: bool = False
    ) -> None:
        """Look for traces, false statuses and half results after one attempt."""
        told = Path(f"{place}.stderr")
        text = told.read_text(errors="replace")
        told.write_text("")
        if "Traceback (most recent call last)" in text:
            outcome.findings.append(self.finding("trace", story, place, text.strip().splitlines()[-1]))
        status = place / "run" / "status.json"
        if status.exists():
            try:
                said = json.loads(status.read_text())["status"]
            except (ValueError, KeyError, TypeError):
                said = "damaged"
            if said == "damaged" or (answered and said == "running") or (last and said != "ok"):
                outcome.findings.append(self.finding("status", story, place, f"status.json says {said}"))
        found, expected = results(place), self.expected[name]
        groups = {"learned": "learned/", "pictures/pictures.json": "pictures/", "scores.json": "scores.json"}
        for mark, start_of in groups.items():
            whole = {file: digest for file, digest in expected.items() if file.startswith(start_of)}
            here = {file: found.get(file) for file in whole}
            if whole and (place / "run" / mark).exists() and here != whole:
                different = min(file for file in whole if here[file] != whole[file])
                kind = "half" if here[different] is None or not last else "bits"
                outcome.findings.append(self.finding(kind, story, place, f"{different} is not whole"))

    def finish(
        self,
        name: str,
        place: Path,
        temporary: Path,
        choose: random.Random,
        story: list[str],
        outcome: Outcome,
    ) -> None:
        """Go on undisturbed and compare; a case without a finding leaves nothing behind."""
        pid = start(self.command(name, place, choose), place, temporary)
        code = wait(pid, LONGEST)
        if code is None:
            end(pid)
        if code != 0:
            told = Path(f"{place}.stderr").read_text(errors="replace").strip().splitlines()
            detail = f"exit code {code}: {told[-1] if told else ''}"
            outcome.findings.append(self.finding("stuck", story, place, detail))
        else:
            self.inspect(name, place, story, outcome, answered=True, last=True)
            found, expected = results(place), self.expected[name]
            if different := sorted(f for f in {*found, *expected} if found.get(f) != expected.get(f)):
                outcome.findings.append(self.finding("bits", story, place, ", ".join(different[:4])))
            left = [
                f
                for f in (place / "run").rglob("*")
                if "unfinished" in f.name or f.name.startswith(".learned")
            ]
            left += [*(place / "run").glob("checkpoints")]
            if left:
                outcome.findings.append(self.finding("rubbish", story, place, str(left[0].name)))
        shutil.rmtree(temporary, ignore_errors=True)
        if not outcome.findings:
            shutil.rmtree(place, ignore_errors=True)
            for stream in ("stdout", "stderr"):
                Path(f"{place}.{stream}").unlink(missing_ok=True)

    def finding(self, kind: str, story: list[str], place: Path, detail: str) -> Finding:
        return Finding(kind, "; ".join(story), str(place), detail)


def mount(place: Path, room: int) -> bool:
    """Whether a file system in memory with so much room could be mounted, which needs root."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", place]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def remount(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=1g", place], check=True)


def share(case, seeds: list[int], file: Path) -> None:
    """Run cases one after the other, and write what each of them saw as a line."""
    with file.open("w") as lines:
        for seed in seeds:
            try:
                outcome = case(seed)
            except Exception as error:
                outcome = Outcome(findings=[Finding("harness", f"seed {seed}", "", f"{error!r}")])
            record = {"seed": seed, "disturbed": outcome.disturbed, "attempts": outcome.attempts}
            record["findings"] = [vars(finding) for finding in outcome.findings]
            lines.write(json.dumps(record) + "\n")
            lines.flush()


def main() -> int:
    """Run the harness; returns 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="signals to send, at least")
    parser.add_argument("--full-disks", type=int, default=0, help="commands to run on a disk that is full")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to work; kept. None: a temporary folder")
    parser.add_argument("--other", default="/dev/shm", help="a folder on another file system")
    parser.add_argument("--no-process", action="store_true", help="do not compare with unforked processes")
    given = parser.parse_args()
    began = time.monotonic()
    folder = Path(given.folder or tempfile.mkdtemp(prefix="kill_runs-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    other = Path(tempfile.mkdtemp(prefix="kill_runs-", dir=given.other))
    prepare()
    harness = Harness(folder, other)
    threads = len(os.listdir("/proc/self/task"))
    gc.freeze()
    told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in harness.seconds.items())
    print(f"{folder}: undisturbed {told}; {threads} thread", flush=True)
    findings = []
    if not given.no_process:
        findings += [finding for name in harness.commands for finding in harness.check_fork(name)]
    disturbed = attempts = cases = 0
    for case, wanted in ((harness.kill_case, given.kills), (harness.disk_case, given.full_disks)):
        seed, reached = given.seed * 1_000_000 + (case == harness.disk_case) * 500_000, 0
        while reached < wanted:
            # a case of signals sends some 1.5; another round sends what is missing
            count = max(given.jobs, -(-(wanted - reached) * 2 // 3))
            files = [folder / f"share-{seed}-{job}.jsonl" for job in range(given.jobs)]
            context = multiprocessing.get_context("fork")
            workers = [
                context.Process(
                    target=share, args=(case, [*range(seed + job, seed + count, given.jobs)], file)
                )
                for job, file in enumerate(files)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            seed += count
            for file in files:
                for line in file.read_text().splitlines():
                    record = json.loads(line)
                    reached += record["disturbed"]
                    disturbed, attempts = disturbed + record["disturbed"], attempts + record["attempts"]
                    cases += 1
                    findings += [Finding(**each) for each in record["findings"]]
    shutil.rmtree(other, ignore_errors=True)
    for finding in findings[:50]:
        print(f"{finding.kind}: {finding.detail}\n    {finding.case}\n    {finding.folder}")
    kinds = Counter(finding.kind for finding in findings)
    print(f"{cases} cases, {attempts} attempts, {disturbed} disturbed, {time.monotonic() - began:.0f} s")
    for kind in ("stuck", "bits", "half", "trace", "status", "rubbish", "harness"):
        print(f"{kind:<8} {kinds[kind]}")
    if not findings and not given.folder:
        shutil.rmtree(folder)
    return int(bool(findings))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        prepare()
        sys.exit(call(sys.argv[2:]))
    sys.exit(main())
