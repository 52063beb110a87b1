"""Kill real commands at random moments, or fill their disk, continue them, and compare their results by bits.

    python scripts/kill_runs.py --kills 500 --full-disks 1000 --jobs 14 --seconds 540

Signals are SIGKILL, SIGTERM and SIGHUP. A *touch* is a moment at which a command opens, makes, renames or
removes a file of its folder. There is one case of a full disk for every touch: from that touch on, no file of
the process can grow beyond 0 bytes, or beyond 4,096 bytes, which leaves files cut off. A command touches
every file before it writes to it, so that the first write of every file fails in some case. Not covered are a
disk without room for a new folder or name, and a disk that is full for the run but not for the temporary
folder.

Python and PyTorch are imported once; every command is `mifo.cli.main` in a forked process on a tiny random
pipeline, with every second temporary folder on another file system. A table is printed at the end. The exit
code is 1 if a fault was found:

    stuck      the command did not reach its end, however often it was continued
    bits       the result differs from that of an undisturbed run, or from that of a separate process
    half       an unfinished result had the name of a finished one
    trace      a traceback was printed
    status     `status.json` is damaged, or says "running" after a signal that a process can answer
    rubbish    files of an interrupted attempt are left beside the finished result

`--seconds` limits the time, and the table shows what was done until then; `--seed` gives other cases, so that
the tables of several calls can be added up.
"""

import argparse
import atexit
import contextlib
import fcntl
import functools
import gc
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

ROOMS = (0, 4096)  # bytes that a file can have on a full disk
LAST = 20  # seconds before the end in which no case begins any more
LONGEST = 120  # seconds of one command before it counts as stuck
SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM] * 2 + [signal.SIGHUP]
TINY = [
    *("device=cpu", "model=local", "learning.semantic.steps=3", "learning.finetuning.steps=2"),
    *("learning.semantic.checkpoint_every=1", "learning.finetuning.checkpoint_every=1"),
    *("learning.prior.pictures=2", "learning.prior.steps=2"),
    *("penalty.reward_steps=1", "trainer.log_every_n_steps=1"),
]
SYNTHESIS = ["synthesis.steps=2", "synthesis.samples=1", "guidance.guided_steps=1", "guidance.iterations=1"]
TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
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


_children: set[int] = set()  # commands of this process that run


def start(
    arguments: list[str],
    place: Path,
    temporary: Path,
    full: tuple[int, int] | None = None,
    stream: int | None = None,
) -> int:
    """Fork a command that works in `place`; returns its process id, which is that of its group.

    Args:
        full: from this touch of a file on, no file can grow beyond so many bytes; None: none is full, and the
            touches of an undisturbed command are counted.
        stream: a file descriptor for what the command prints, since a file cannot grow on a full disk; None:
            files beside `place`.
    """
    temporary.mkdir(parents=True, exist_ok=True)
    Path(f"{place}.stderr").touch()  # read also where the command was killed before it had opened it
    pid = os.fork()
    if pid:
        _children.add(pid)
        return pid
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(place)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(stream or os.open(f"{place}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ |= {"TMPDIR": str(temporary), "XDG_CACHE_HOME": f"{place}/cache"}
        tempfile.tempdir = None
        touches = _count_touches(place, *(full or (None, 0)))
        atexit._clear()
        began = time.monotonic()
        code = call(arguments)
        atexit._run_exitfuncs()
        if place.parent.name in ("undisturbed", "measured"):
            Path(f"{place}.measured").write_text(json.dumps([touches[0], time.monotonic() - began]))
            Path(f"{place}.modules").write_text("\n".join(sys.modules))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _count_touches(place: Path, last: int | None, room: int) -> list[int]:
    """Count how often this process touches a file below `place`; at number `last` the disk is full.

    Returns:
        A list whose one number is the count so far.
    """
    count = [0]

    def touched(event: str, arguments: tuple) -> None:
        if event not in TOUCHES or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if os.path.abspath(os.fsdecode(arguments[0])).startswith(f"{place}/"):
            count[0] += 1
            if count[0] == last:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    sys.addaudithook(touched)
    return count


def wait(pid: int, seconds: float) -> int | None:
    """The exit code (negative: a signal) of a process that ends within `seconds`, else None."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _children.discard(pid)
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def end(pid: int) -> None:
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    _children.discard(pid)


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
        if file.suffix == ".yaml":  # which says whether it was gone on with, and by which commit
            content = re.sub(rb"(?m)^ *(resume|code|dirty): .*$", b"", content)
        if file.name == "learned.json":  # whose checksum of that file changes with it
            content = re.sub(rb'"config.yaml": "\w+"', b"", content)
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
        before = folder / "undisturbed"
        model = [*TINY[:2], own[0], "hydra.run.dir=run"]
        learned, pictures = before / "learn" / "run", before / "run" / "run" / "pictures"
        self.commands |= {
            "synthesize": ["synthesize", f"learned={learned}", *model, *SYNTHESIS, *TWO_PROMPTS],
            "evaluate": ["evaluate", f"pictures={pictures}", "device=cpu", "hydra.run.dir=run"],
        }
        self.expected: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.touches: dict[str, int] = {}
        self.undisturbed({name: before / name for name in ("learn", "run")})

    def undisturbed(self, places: dict[str, Path]) -> None:
        """Run commands undisturbed, beside each other; their results are what every other must equal."""
        pids = {}
        for name, place in places.items():
            place.mkdir(parents=True)
            pids[name] = start(self.commands[name], place, place / "tmp")
        for name, pid in pids.items():
            place, code = places[name], wait(pid, 600)
            found = results(place)
            if code != 0 or not found:
                print(Path(f"{place}.stderr").read_text(), file=sys.stderr)
                raise SystemExit(f"mifo {name} does not run undisturbed (exit code {code})")
            if self.expected.setdefault(name, found) != found:
                raise SystemExit(f"mifo {name} gives other bits the second time, undisturbed; see {place}")
            self.touches[name], self.seconds[name] = json.loads(Path(f"{place}.measured").read_text())
            for module in Path(f"{place}.modules").read_text().splitlines():
                with contextlib.suppress(Exception):  # what it imported is imported once, for all
                    importlib.import_module(module)

    def measure(self) -> None:
        """Run every command once more, as it will be disturbed: all of its modules are there."""
        self.undisturbed({name: self.folder / "undisturbed" / name for name in ("synthesize", "evaluate")})
        self.undisturbed({name: self.folder / "measured" / name for name in self.commands})

    def processes(self) -> dict[str, subprocess.Popen]:
        """Each command in a process that imports everything anew."""
        begun = {}
        for name, arguments in self.commands.items():
            place = self.folder / "process" / name
            place.mkdir(parents=True)
            with Path(f"{place}.stderr").open("w") as told:
                command = [sys.executable, __file__, "--process", *arguments]
                own = os.environ | {"XDG_CACHE_HOME": f"{place}/cache"}
                begun[name] = subprocess.Popen(
                    command,
                    cwd=place,
                    stdout=subprocess.DEVNULL,
                    stderr=told,
                    env=own,
                    start_new_session=True,
                )
        return begun

    def check_process(self, name: str, process: subprocess.Popen, seconds: float) -> Outcome:
        """Whether a process of its own has given the same bits as a forked one."""
        place = self.folder / "process" / name
        try:
            code = process.wait(max(1, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = "none, as time was over"
        if code == 0 and results(place) == self.expected[name]:
            return Outcome(0, 1)
        told = f"exit code {code}: {Path(f'{place}.stderr').read_text()[-300:]}"
        return Outcome(0, 1, [Finding("bits", f"{name} in a process of its own", str(place), told)])

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
            # before the command's first line it has no group of its own yet
            own_group = os.getpgid(pid) == pid
            (os.killpg if number == signal.SIGKILL and own_group else os.kill)(pid, number)
            outcome.disturbed += 1
            code = wait(pid, LONGEST)
            if code is None:
                end(pid)
                outcome.findings.append(self.finding("stuck", story, place, "does not end by a signal"))
            could_answer = number != signal.SIGKILL and code != -number
            self.inspect(name, place, story, outcome, answered=pid if could_answer else None)
        self.finish(name, place, temporary, choose, story, outcome)
        return outcome

    def disk_case(self, seed: int, name: str, touch: int, room: int) -> Outcome:
        """Start a command whose disk fills at a touch of a file, make room, and go on until it is done."""
        choose = random.Random(seed)
        place = self.folder / "cases" / f"full-{name}-{touch}-{room}"
        place.mkdir(parents=True)
        temporary = place / "tmp"
        outcome = Outcome()
        story = [f"no file grows beyond {room} bytes from touch {touch} of a file on"]
        told, stream = os.pipe()
        fcntl.fcntl(told, fcntl.F_SETPIPE_SZ, 2**20)
        pid = start(self.commands[name], place, temporary, (touch, room), stream)
        os.close(stream)
        outcome.attempts += 1
        code = wait(pid, LONGEST)
        if code is None:
            end(pid)
            outcome.findings.append(self.finding("stuck", story, place, "does not end"))
        os.set_blocking(told, False)
        with open(told, "rb") as text:
            Path(f"{place}.stderr").write_bytes(text.read() or b"")
        outcome.disturbed += code != 0
        # nobody can write how it ended
        self.inspect(name, place, story, outcome)
        self.finish(name, place, temporary, choose, story, outcome)
        return outcome

    def disk_cases(self, most: int, seed: int) -> list[tuple[int, str, int, int]]:
        """Cases of full disks: every touch of every command with both rooms, or `most` of these."""
        everything = [
            (name, touch, room)
            for name in self.commands
            for touch in range(1, self.touches[name] + 1)
            for room in ROOMS
        ]
        random.Random(0).shuffle(everything)
        first = seed * most % len(everything)
        chosen = (everything[first:] + everything[:first])[:most]
        return [(number, *case) for number, case in enumerate(chosen)]

    def command(self, name: str, place: Path, choose: random.Random) -> list[str]:
        """The command as it was typed first, or `resume=` where there is something to go on with."""
        if (place / "run" / "config.yaml").is_file() and choose.random() < 0.5:
            return [self.commands[name][0], "resume=run"]
        return self.commands[name]

    def inspect(
        self,
        name: str,
        place: Path,
        story: list[str],
        outcome: Outcome,
        answered: int | None = None,
        last: bool = False,
    ) -> None:
        """Look for traces, false statuses and half results after one attempt.

        Args:
            answered: the process that could say how it ended; the status of a killed one before it stays
                "running", which readers of the status tell as "died".
        """
        told = Path(f"{place}.stderr")
        text = told.read_text(errors="replace")
        told.write_text("")
        if "Traceback (most recent call last)" in text:
            outcome.findings.append(self.finding("trace", story, place, text.strip().splitlines()[-1]))
            Path(f"{place}.trace").write_text(text)
        status = place / "run" / "status.json"
        if status.exists():
            try:
                record = json.loads(status.read_text())
                said, process = record["status"], record.get("pid")
            except (AttributeError, ValueError, KeyError, TypeError):
                said, process = "damaged", None
            false = answered is not None and said == "running" and process == answered
            if said == "damaged" or false or (last and said != "ok"):
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
            self.inspect(name, place, story, outcome, answered=pid, last=True)
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


def share(one: Callable[[Any], dict], cases: list, file: Path, stop: Callable[[], bool]) -> None:
    """Run cases one after the other until `stop`, and write what was seen of each as a line."""

    def ended(*_: object) -> None:
        for pid in _children:
            os.killpg(pid, signal.SIGKILL)
        os._exit(1)

    signal.signal(signal.SIGTERM, ended)
    with file.open("w") as lines:
        for case in cases:
            if stop():
                return
            lines.write(json.dumps(one(case)) + "\n")
            lines.flush()


def run_shares(
    one: Callable[[Any], dict], cases: list, jobs: int, folder: Path, until: float, enough: int | None = None
) -> list[dict]:
    """Run `one` on cases in `jobs` processes; returns what was seen of those that ended before `until`.

    Args:
        until: by the monotonic clock.
        enough: stop where the sum of what is disturbed has reached this.
    """
    context = multiprocessing.get_context("fork")
    disturbed = context.Value("i", 0)

    def counted(case: Any) -> dict:
        record = one(case)
        with disturbed.get_lock():
            disturbed.value += record.get("disturbed", 0)
        return record

    def stop() -> bool:
        return time.monotonic() > until - LAST or (enough is not None and disturbed.value >= enough)

    folder.mkdir()
    files = [folder / f"{job}.jsonl" for job in range(jobs)]
    workers = [
        context.Process(target=share, args=(counted, cases[job::jobs], file, stop))
        for job, file in enumerate(files)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0, until - time.monotonic()) if until < math.inf else None)
        worker.terminate()
    for worker in workers:
        worker.join()
    return [
        json.loads(line)
        for file in files
        if file.exists()
        for line in file.read_text().splitlines(True)
        if line.endswith("\n")
    ]


def seen(case: Callable[..., Outcome], arguments: tuple) -> dict:
    """What a case saw, as JSON holds it; an error of the harness is a finding too."""
    try:
        outcome = case(*arguments)
    except Exception as error:
        outcome = Outcome(findings=[Finding("harness", f"{case.__name__}{arguments}", "", f"{error!r}")])
    return vars(outcome) | {"findings": [vars(finding) for finding in outcome.findings]}


def main() -> int:
    """Run the harness; returns 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="signals to send, at least")
    parser.add_argument("--full-disks", type=int, default=0, help="cases of full disks, at most")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which it ends")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to work; kept. None: a temporary folder")
    parser.add_argument("--other", default="/dev/shm", help="a folder on another file system")
    given = parser.parse_args()
    began = time.monotonic()
    until = began + given.seconds
    folder = Path(given.folder or tempfile.mkdtemp(prefix="kill_runs-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    other = Path(tempfile.mkdtemp(prefix="kill_runs-", dir=given.other))
    prepare()
    harness = Harness(folder, other)
    harness.measure()
    threads = len(os.listdir("/proc/self/task"))
    told = ", ".join(
        f"{name} {seconds:.1f} s, {harness.touches[name]} touches"
        for name, seconds in harness.seconds.items()
    )
    print(f"{folder}: ready after {time.monotonic() - began:.0f} s: {told}; {threads} thread", flush=True)
    gc.freeze()
    processes = harness.processes()
    # a case sends one signal to three, or none where its command was faster
    kills = [(given.seed * 1_000_000 + number,) for number in range(2 * given.kills)]
    disks = harness.disk_cases(given.full_disks, given.seed)
    # kills have the time that their number deserves
    kills_until = until
    if disks and kills and given.seconds < math.inf:
        kills_until -= (until - time.monotonic()) * len(disks) / (len(disks) + given.kills)
    rows = {}
    for name, case, cases, end_of, enough in (
        ("kills", harness.kill_case, kills, kills_until, given.kills),
        ("full disks", harness.disk_case, disks, until, None),
    ):
        one = functools.partial(seen, case)
        rows[name] = run_shares(one, cases, given.jobs, folder / f"shares of {name}", end_of, enough)
    rows["processes"] = [
        seen(harness.check_process, (name, process, until - time.monotonic()))
        for name, process in processes.items()
    ]
    shutil.rmtree(other, ignore_errors=True)
    findings = [
        Finding(**each) for records in rows.values() for record in records for each in record["findings"]
    ]
    for finding in findings[:50]:
        print(f"{finding.kind}: {finding.detail}\n    {finding.case}\n    {finding.folder}")
    kinds = ("stuck", "bits", "half", "trace", "status", "rubbish", "harness")
    columns = ("cases", "attempts", "disturbed", *kinds)
    print(f"{'':<12}" + "".join(f"{column:>10}" for column in columns))
    for name, records in rows.items():
        found = Counter(each["kind"] for record in records for each in record["findings"])
        counts = [len(records), *(sum(record[key] for record in records) for key in columns[1:3])]
        print(
            f"{name:<12}" + "".join(f"{count:>10}" for count in (*counts, *(found[kind] for kind in kinds)))
        )
    asked = f"asked for {given.kills} kills and {len(disks)} full disks"
    print(f"{len(findings)} found, {time.monotonic() - began:.0f} s, seed {given.seed}, {asked}")
    if not findings and not given.folder:
        shutil.rmtree(folder)
    return int(bool(findings))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        prepare()
        sys.exit(call(sys.argv[2:]))
    sys.exit(main())
