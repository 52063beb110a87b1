"""Damage the files that MIFO reads, run the command that reads them, and check how the command ends.

    python scripts/fuzz_inputs.py --cases 5000 --jobs 14 --seconds 540

Each case damages one file: of a photo with masks in one of four forms, of class pictures, of a learned
result, of pictures, of a run's checkpoints or records, of a table, of a model, or an imported word or LoRA.
Other cases set one key of a run to a value that makes no sense. Every command is `mifo.cli.main` in a forked
process on a tiny random pipeline. It must end with its result (that of the undamaged file, if there is a
checksum) or with one sentence. `--seconds` limits the time;
`--seed` gives other cases. A table is printed at the end. The exit code is 1 if a command ended otherwise,
and the files of the case are kept:

    hang       the command took longer than 60 seconds
    trace      a traceback was printed, or the process died
    silent     it failed without a sentence
    different  the result differs from that of the undamaged files, and nothing was said
    wrong      a result holds numbers that are not finite
"""

import argparse
import contextlib
import csv
import functools
import gc
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kill_runs import SYNTHESIS, TINY, TWO_PROMPTS, Harness, end, prepare, results, run_shares, start, wait

LIMIT = 60  # seconds of one command
ODD = [
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    "",
    "../..",
    "/dev/zero",
    [],
    {},
    [[]],
    "\x00",
    "é",
    "NaN",
    "a" * 5000,
]
VALUES = [
    "null",
    "true",
    "-1",
    "0",
    "0.5",
    "1e308",
    "1e-300",
    "nan",
    "inf",
    "-inf",
    "''",
    "x",
    "é",
    "'../..'",
]
VALUES += ["[]", "{}", "[null]", "[[1]]", "{a: 1}", "'${oops}'", "'<asset9>'", "/dev/zero", "a" * 300]


@dataclass(frozen=True)
class Kind:
    """A folder of inputs and the command that reads it.

    Attributes:
        given: the undamaged folder.
        place: where the command looks for it.
        files: patterns of the files that are damaged; none: a value of its configuration is typed instead.
        checked: whether a change of their content must be noticed; else other content is another input.
    """

    name: str
    given: Path
    place: str
    files: tuple[str, ...]
    command: list[str]
    checked: bool


def kinds(harness: Harness) -> list[Kind]:
    """Every kind of input, with a folder of each."""
    made = harness.folder / "undisturbed"
    source = next(text for text in harness.commands["learn"] if text.startswith("model.source="))
    model = ["device=cpu", "model=local", source]
    short = ["learning.semantic.steps=1", "learning.finetuning.steps=1", "hydra.run.dir=run"]
    photo = ["instances=local", "instances.class_names=[car,cat]"]
    learn = ["learn", *TINY, source, *photo, *short]
    own = f"instances.folder={harness.folder / 'photo'}"
    classes = harness.folder / "class_pictures"
    classes.mkdir()
    for number, picture in enumerate(sorted((made / "run" / "run" / "pictures").glob("*.png"))):
        shutil.copy(picture, classes / f"{number}.png")
    masks = annotated_photos(harness.folder / "annotated", harness.folder / "photo" / "img.png")
    imported = imported_files(harness.folder / "imported", Path(source.partition("=")[2]))
    half = half_learned(harness)
    write_small_table(harness.folder / "table")
    synthesis = [*model, *SYNTHESIS, *TWO_PROMPTS, "hydra.run.dir=run"]
    table = ["table", "given/small", "table.workers=0", "table.missing=leave", "table.record=given/record"]
    table += ["table.results=run", "table.runs=runs"]
    resume = ["learn", "resume=run"]
    records = ("status.json", "command.json", "config.yaml")
    learned, pictures = made / "learn" / "run" / "learned", made / "run" / "run" / "pictures"
    imports = ["model.words={mine: given/word.safetensors}", "model.lora=given/lora.safetensors"]
    return [
        Kind("photo", harness.folder / "photo", "given", ("*",), [*learn, "instances.folder=given"], False),
        *(
            Kind(name, folder, "given", ("*",), [*learn, "instances.folder=given"], False)
            for name, folder in masks.items()
        ),
        Kind("imports", imported, "given", ("*",), [*learn, own, *imports], False),
        Kind("class pictures", classes, "given", ("*",), [*learn, own, "learning.prior.folder=given"], False),
        Kind("learned", learned, "given", ("*",), ["synthesize", "learned=given", *synthesis], True),
        Kind(
            "pictures", pictures, "given", ("*",), ["evaluate", "pictures=given", "hydra.run.dir=run"], False
        ),
        Kind("checkpoints", half, "run", ("checkpoints/**/*",), resume, True),
        Kind("run records", half, "run", records, resume, False),
        Kind("values", made / "run" / "run", "before", (), harness.commands["run"], False),
        Kind("table", harness.folder / "table", "given", ("small/*", "record/*"), table, False),
        Kind(
            "model",
            Path(source.partition("=")[2]),
            "given",
            ("**/*",),
            ["synthesize", f"learned={learned}", *model[:2], "model.source=given", *synthesis[3:]],
            False,  # of a base model only what docs/promises.md names is compared
        ),
    ]


def annotated_photos(folder: Path, image: Path) -> dict[str, Path]:
    """Photos of two instances whose masks are a label image, annotations of COCO, and boxes."""
    from PIL import Image

    places = {name: folder / name for name in ("labels", "coco", "boxes")}
    for place in places.values():
        place.mkdir(parents=True)
        shutil.copy(image, place / "img.png")
    labels = Image.new("L", (32, 32))
    labels.paste(1, (2, 4, 14, 20))
    labels.paste(2, (16, 10, 30, 30))
    labels.save(places["labels"] / "labels.png")
    runs = {"counts": [32 * 16 + 10, 20, 12, 20, 32 * 14 + 2], "size": [32, 32]}
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 4, 12, 16], "iscrowd": 0}
        | {"segmentation": [[2, 4, 14, 4, 14, 20, 2, 20]]},
        {
            "id": 2,
            "image_id": 1,
            "category_id": 2,
            "bbox": [16, 10, 2, 20],
            "iscrowd": 0,
            "segmentation": runs,
        },
    ]
    content = {
        "images": [{"id": 1, "height": 32, "width": 32, "file_name": "img.png"}],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "cat"}],
        "annotations": annotations,
    }
    (places["coco"] / "annotations.json").write_text(json.dumps(content, indent=1))
    boxes = "car: [0.05, 0.1, 0.45, 0.6]\ncat: [0.5, 0.3, 0.95, 0.95]\n"
    (places["boxes"] / "boxes.yaml").write_text(boxes)
    return places


def imported_files(folder: Path, pipeline: Path) -> Path:
    """A word and a LoRA of a pipeline's cross-attention, as other programs write them."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    (table,) = (
        tensor
        for name, tensor in load_file(next(pipeline.glob("text_encoder/*.safetensors"))).items()
        if name.endswith("token_embedding.weight")
    )
    save_file({"mine": table[:1].clone()}, folder / "word.safetensors")
    weights = load_file(next(pipeline.glob("unet/*.safetensors")))
    name = min(name for name in weights if name.endswith("attn2.to_q.weight"))
    (rows, columns), layer = weights[name].shape, f"unet.{name.removesuffix('.weight')}"
    lora = {f"{layer}.lora_A.weight": (2, columns), f"{layer}.lora_B.weight": (rows, 2)}
    save_file({name: torch.full(shape, 0.01) for name, shape in lora.items()}, folder / "lora.safetensors")
    return folder


def half_learned(harness: Harness) -> Path:
    """The folder of a run that was killed in its second stage."""
    for _ in range(20):
        place = harness.folder / "half"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        pid = start(harness.commands["learn"], place, place / "tmp")
        while not [*(place / "run" / "checkpoints").glob("finetuning/*.ckpt")]:
            if wait(pid, 0.001) is not None:
                break
        else:
            end(pid)
            return place / "run"
    raise SystemExit("no run could be killed in its second stage")


def write_small_table(folder: Path) -> None:
    """A table of two runs whose record holds both, written in a process of its own: it composes."""
    worker = multiprocessing.get_context("fork").Process(target=_write_small_table, args=(folder,))
    worker.start()
    worker.join()
    if worker.exitcode:
        raise SystemExit("the small table could not be written")


def _write_small_table(folder: Path) -> None:
    from mifo.metrics.scores import Evaluator, Score
    from mifo.tables.plan import plan
    from mifo.tables.record import Entry, write_record
    from mifo.tables.settings import read_table

    for name in ("small", "record"):
        (folder / name).mkdir(parents=True)
    (folder / "small" / "table.yaml").write_text(
        "title: Small\nrows:\n  MIFO: [method=mifo]\n  none: [method=no_attention_loss]\n"
        "scenes:\n  cars: [three_cars]\nseeds: [0]\ncolumns: [editability]\n"
    )
    runs = plan("small", *read_table(folder / "small", []))
    score = Score("editability", 0.5, True, Evaluator("colour", "0" * 12), "test")
    write_record(folder / "record", [(run, Entry(f"{run.key}-{'0' * 12}", (score,), None)) for run in runs])


# damage: each takes the file and a source of randomness, and changes the file in place


def flip(file: Path, choose: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(choose.choice([1, 1, 2, 8, 64])):
        content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    file.write_bytes(content)


def cut(file: Path, choose: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: choose.randrange(len(content))])


def lengthen(file: Path, choose: random.Random) -> None:
    file.write_bytes(file.read_bytes() + choose.randbytes(choose.randint(1, 500)))


def scramble(file: Path, choose: random.Random) -> None:
    content = bytearray(file.read_bytes())
    length = min(64, len(content))
    start = choose.randrange(len(content) - length + 1)
    content[start : start + length] = choose.randbytes(length)
    file.write_bytes(content)


def empty(file: Path, choose: random.Random) -> None:
    file.write_bytes(b"")


def zeros(file: Path, choose: random.Random) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def noise(file: Path, choose: random.Random) -> None:
    file.write_bytes(choose.randbytes(choose.randint(1, 3000)))


def huge_header(file: Path, choose: random.Random) -> None:
    content = file.read_bytes()
    head = choose.choice([struct.pack("<Q", 1 << 40), struct.pack("<Q", 90_000_000), b"\xff" * 8])
    if content.startswith(b"\x89PNG"):
        head = content[:16] + struct.pack(">II", *choose.choice([(1 << 30, 1 << 30), (60_000, 60_000)]))
    file.write_bytes(head + content[len(head) :])


def missing(file: Path, choose: random.Random) -> None:
    file.unlink()


def pipe(file: Path, choose: random.Random) -> None:
    file.unlink()
    os.mkfifo(file)


def link(file: Path, choose: random.Random) -> None:
    file.unlink()
    file.symlink_to(choose.choice(["/dev/zero", "/dev/random", "nowhere", file.name, "/proc/self/mem", ".."]))


def folder_instead(file: Path, choose: random.Random) -> None:
    file.unlink()
    file.mkdir()


def deep(file: Path, choose: random.Random) -> None:
    if file.suffix in (".yaml", ".yml"):
        names = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(12)]
        file.write_text("\n".join(names))
    else:
        file.write_text(choose.choice(["[", '{"a":']) * 200_000)


def odd_value(file: Path, choose: random.Random) -> None:
    """Content of the right form with one value that makes no sense."""
    if file.suffix == ".json":
        content = json.loads(file.read_text())
        _replace_one(content, choose)
        file.write_text(json.dumps(content))
    elif file.suffix in (".yaml", ".yml"):
        lines = file.read_text().splitlines()
        at = choose.randrange(len(lines))
        key = lines[at].partition(":")[0]
        lines[at] = choose.choice(
            [f"{key}: {json.dumps(choose.choice(ODD))}", f"\t{lines[at]}", lines[at] * 2, f"{key}: ${{oops"]
        )
        file.write_text("\n".join(lines))
    elif file.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(file.read_text())))
        row = choose.choice(rows)
        row[choose.randrange(len(row))] = str(choose.choice(ODD))
        with file.open("w", newline="") as text:
            csv.writer(text).writerows(rows)
    elif file.suffix == ".safetensors":
        _odd_tensors(file, choose)
    elif file.suffix == ".ckpt":
        _odd_checkpoint(file, choose)
    elif file.suffix == ".png":
        _odd_image(file, choose)
    else:
        scramble(file, choose)


def _replace_one(content: object, choose: random.Random) -> None:
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = choose.choice(keys)
        inner = content[key]
        if not (isinstance(inner, dict | list) and inner) or choose.random() < 0.2:
            if isinstance(content, dict) and choose.random() < 0.2:
                del content[key]
            else:
                content[key] = choose.choice([*ODD, math.nan, math.inf])
            return
        content = inner


def _odd_tensor(tensor, choose: random.Random):
    import torch

    return choose.choice(
        [
            lambda: torch.full_like(tensor, math.nan) if tensor.is_floating_point() else tensor * 0 - 1,
            lambda: tensor * math.inf if tensor.is_floating_point() else tensor * 0,
            lambda: tensor.flatten()[:1],
            lambda: tensor[None],
            lambda: tensor.to(torch.int64),
            lambda: tensor.to(torch.float16),
            lambda: tensor.bool(),
            lambda: torch.zeros(()),
            lambda: tensor * 0,
            lambda: tensor[..., :-1].contiguous() if tensor.ndim else tensor,
        ]
    )()


def _odd_tensors(file: Path, choose: random.Random) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = choose.choice(sorted(tensors))
    if choose.random() < 0.15:
        tensors[name + "x"] = tensors.pop(name)
    else:
        tensors[name] = _odd_tensor(tensors[name], choose)
    save_file(tensors, file)


def _odd_checkpoint(file: Path, choose: random.Random) -> None:
    import torch

    content = torch.load(file, weights_only=False)
    change = choose.randrange(4)
    states = content.get("state_dict") or {}
    if change == 0 and states:
        name = choose.choice(sorted(states))
        states[name] = _odd_tensor(states[name], choose)
    elif change == 1:
        content["state_dict"] = {}
    elif change == 2:
        content.pop(choose.choice(sorted(content)))
    else:
        content[choose.choice(sorted(content))] = choose.choice(ODD)
    torch.save(content, file)


def _odd_image(file: Path, choose: random.Random) -> None:
    from PIL import Image

    image = Image.open(file)
    changes: dict[str, Callable[[], Image.Image]] = {
        "small": lambda: image.resize((1, 1)),
        "wide": lambda: image.resize((500, 2)),
        "grey": lambda: image.convert("LA"),
        "transparent": lambda: image.convert("RGBA"),
        "palette": lambda: image.convert("P"),
        "bits": lambda: image.convert("1"),
        "deep": lambda: image.convert("I;16") if image.mode == "L" else image.convert("I"),
        "black": lambda: Image.new(image.mode, image.size),
        "bomb": lambda: Image.new("1", (20_000, 20_000)),
    }
    form = choose.choice(["PNG", "PNG", "PNG", "JPEG", "GIF", "TIFF"])
    try:
        changes[choose.choice(sorted(changes))]().save(file, form)
    except OSError:  # this form cannot hold it
        image.convert("RGB").save(file, "JPEG")


DAMAGE = [
    *(flip, flip, flip, cut, cut, lengthen, scramble, scramble, empty, zeros, noise, huge_header, missing),
    *(pipe, link, folder_instead, deep, odd_value, odd_value, odd_value, odd_value),
]


def damage_one(root: Path, patterns: tuple[str, ...], choose: random.Random) -> tuple[Path, str, bool]:
    """Damage one of the files; returns it, the way, and whether it has the same bytes as before."""
    files = sorted(file for pattern in patterns for file in root.glob(pattern) if file.is_file())
    file = choose.choice(files)
    before = file.read_bytes()
    if choose.random() < 0.05:
        other = choose.choice(files)
        how, content = f"swap with {other.name}", other.read_bytes()
        file.write_bytes(content)
    else:
        damage = choose.choice(DAMAGE if before else [noise, missing, pipe, link, folder_instead])
        how = damage.__name__
        damage(file, choose)
    return file, how, file.is_file() and not file.is_symlink() and file.read_bytes() == before


def odd_override(recorded: Path, choose: random.Random) -> str:
    """`key=value` of a key of the recorded configuration, with a value that makes no sense."""
    import yaml

    def leaves(node: object, keys: tuple[str, ...]) -> Iterator[str]:
        if isinstance(node, dict) and node:
            for name, value in node.items():
                yield from leaves(value, (*keys, name))
        elif keys and keys[0] not in ("paths", "task", "resume", "hydra"):
            yield ".".join(keys)

    key = choose.choice([*leaves(yaml.safe_load(recorded.read_text()), ())])
    # no large numbers, which ask for long work
    return f"{key}={choose.choice(VALUES)}"


def undamaged(harness: Harness, wanted: list[Kind]) -> dict[str, dict[str, str]]:
    """What the command of each kind gives where nothing is damaged."""
    pids, expected = {}, {}
    for kind in wanted:
        place = harness.folder / "undisturbed" / kind.name.replace(" ", "_")
        shutil.copytree(kind.given, place / kind.place)
        pids[kind.name] = place, start(kind.command, place, place / "tmp")
    for name, (place, pid) in pids.items():
        code, expected[name] = wait(pid, 600), results(place)
        if code != 0 or not expected[name]:
            print(Path(f"{place}.stderr").read_text(), file=sys.stderr)
            raise SystemExit(f"mifo does not run on an undamaged {name} (code {code})")
        for module in Path(f"{place}.modules").read_text().splitlines():
            with contextlib.suppress(Exception):
                importlib.import_module(module)
    return expected


def seen(harness: Harness, all_kinds: list[Kind], expected: dict[str, dict[str, str]], seed: int) -> dict:
    """What `fuzz` saw; an error of the harness is seen too."""
    try:
        return fuzz(harness, all_kinds, expected, seed)
    except Exception as error:
        record = {"seed": seed, "kind": "harness", "file": "", "damage": "", "problem": "harness"}
        return record | {"seconds": 0.0, "code": None, "folder": "", "told": repr(error)}


def fuzz(harness: Harness, all_kinds: list[Kind], expected: dict[str, dict[str, str]], seed: int) -> dict:
    """Damage one file, run its command, and say how it ended."""
    choose = random.Random(seed)
    kind = all_kinds[seed % len(all_kinds)]
    place = harness.folder / "cases" / f"{seed:06d}"
    shutil.copytree(kind.given, place / kind.place)
    root = place / kind.place
    command = kind.command
    if not kind.files:
        file, same = root / "config.yaml", False
        how = odd_override(file, choose)
        command = [*command, how]
    else:
        file, how, same = damage_one(root, kind.files, choose)
    began = time.monotonic()
    pid = start(command, place, place / "tmp")
    code = wait(pid, LIMIT)
    seconds = time.monotonic() - began
    if code is None:
        end(pid)
    told = Path(f"{place}.stderr").read_text(errors="replace")
    found = results(place)
    problem = None
    if code is None:
        problem = "hang"
    elif "Traceback (most recent call last)" in told or code < 0:
        problem = "trace"
    elif code != 0 and "mifo: error: " not in told and "\nrefused: " not in told:  # of some of a table's runs
        problem = "silent"
    elif code == 0 and (kind.checked or same) and found != expected[kind.name]:
        problem = "different"
    elif code == 0 and not finite(place / "run"):
        problem = "wrong"
    record = {"seed": seed, "kind": kind.name, "file": str(file.relative_to(root)), "damage": how}
    record |= {"problem": problem, "seconds": seconds, "code": code, "folder": str(place)}
    record["told"] = " ".join(told.split())[-300:] if problem else ""
    if not problem:
        shutil.rmtree(place)
        for stream in ("stdout", "stderr"):
            Path(f"{place}.{stream}").unlink()
    return record


def finite(run: Path) -> bool:
    """Whether every number of a result is finite."""
    import torch
    from safetensors.torch import load_file

    tensors = [t for file in run.glob("learned/*.safetensors") for t in load_file(file).values()]
    text = "".join(file.read_text() for file in [*run.glob("scores.json"), *run.glob("*.csv")])
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors) and "nan" not in text.lower()


def main() -> int:
    """Run the harness; returns 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which it ends")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; one more for each other")
    parser.add_argument("--kind", help="damage files of this kind only, such as learned")
    parser.add_argument("--folder", help="where to work; kept. None: a temporary folder")
    given = parser.parse_args()
    began = time.monotonic()
    folder = Path(given.folder or tempfile.mkdtemp(prefix="fuzz_inputs-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    prepare()
    harness = Harness(folder, folder)
    wanted = [kind for kind in kinds(harness) if given.kind in (None, kind.name)]
    expected = undamaged(harness, wanted)
    print(f"{folder}: ready after {time.monotonic() - began:.0f} s", flush=True)
    gc.freeze()
    (folder / "cases").mkdir()
    one = functools.partial(seen, harness, wanted, expected)
    seeds = [*range(given.seed, given.seed + given.cases)]
    records = run_shares(one, seeds, given.jobs, folder / "shares", began + given.seconds)
    counts: dict[str, Counter] = defaultdict(Counter)
    for record in records:
        ended = record["problem"] or ("result" if record["code"] == 0 else "sentence")
        counts[record["kind"]][ended] += 1
    found = [record for record in records if record["problem"]]
    for record in found[:60]:
        print("{problem}: {kind} {file}, {damage}, seed {seed}, {folder}\n    {told}".format(**record))
    columns = ["result", "sentence", "hang", "trace", "silent", "different", "wrong", "harness"]
    print(f"{'':<16}" + "".join(f"{column:>10}" for column in columns))
    for name, ends in sorted(counts.items()):
        print(f"{name:<16}" + "".join(f"{ends[column]:>10}" for column in columns))
    slow = max((record["seconds"] for record in records), default=0.0)
    print(
        f"{len(records)} cases of {given.cases}, seed {given.seed}, slowest {slow:.1f} s, "
        f"{len(found)} found, {time.monotonic() - began:.0f} s"
    )
    if not found and not given.folder:
        shutil.rmtree(folder)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
