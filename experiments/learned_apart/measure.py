"""Leakage of instances that were learned together, learned apart and put together, and drawn alone.

    python experiments/learned_apart/measure.py [workers=8] [seeds=0,1,2] [scenes=alike_*] [KEY=VALUE ...]

Scenes are drawn ones of conf/instances and of the benchmark, by name or pattern. Every instance of a scene is
drawn once more alone, in its place and on its background. The scene and these pictures are learned with the
same settings, the same layouts are made of both results, and the instances of the scene judge both. As a
control, the result of each single picture is also drawn alone, in its box of the same layouts, where nothing
can mix. Other keys are overrides of learning and synthesis. Finished runs are not made again.
outputs/learned_apart holds the runs and the record, runs.csv and table.md.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

import mifo
from mifo.commands.calibrate import drawn_spec, named_scenes, several_things
from mifo.data.layouts import ARRANGEMENTS
from mifo.data.saved_pictures import as_image
from mifo.errors import MifoError
from mifo.files import whole_folder
from mifo.metrics.evaluation import Evaluation
from mifo.world.scenes import redraw_scene, render_scene
from mifo.world.spec import SceneSpec

OUTPUT = Path("outputs/learned_apart")
HOW = ("together", "apart", "alone")
QUIET = ["logger=none", "callbacks=none"]
METRICS = [
    "leakage",
    "identification",
    "instance_consistency",
    "editability",
    "class_accuracy_whole",
    "box_adherence",
]


def _without(given: list[str], *sections: str) -> list[str]:
    return [each for each in given if not each.startswith(sections)]


def read_scene(name: str) -> SceneSpec:
    (scene,) = named_scenes([name])
    return drawn_spec(scene)


def photo(name: str, number: int) -> Path:
    return OUTPUT / "photos" / f"{name}-{number}"


def draw_alone(name: str, number: int) -> Path:
    """Draw the picture and the mask of one thing of a scene, unless they are there; returns their folder."""
    folder, spec = photo(name, number), read_scene(name)
    if not folder.is_dir():
        box = render_scene(spec).boxes[number].tolist()
        alone = redraw_scene(spec, [number], [box], spec.background, seed=number)
        with whole_folder(folder) as unfinished:
            as_image(alone.image).save(unfinished / "img.png")
            as_image(alone.masks[:1].float()).save(unfinished / "mask0.png")
    return folder


def local_instances(folder: Path, things: list[str]) -> list[str]:
    """Overrides for the instances of a folder, by what they are."""
    classes = ",".join(things)
    return [
        "instances=local",
        f"instances.folder={folder}",
        f"instances.class_names=[{classes}]",
        f"instances.initializers=[{classes}]",
    ]


def judges(name: str, first: int) -> list[str]:
    """Overrides for the instances of a scene with one of them first, as the judges of its single result."""
    spec = read_scene(name)
    order = sorted(range(len(spec.things)), key=lambda number: number != first)
    folder = OUTPUT / "photos" / f"{name}-judges-{first}"
    if not folder.is_dir():
        scene = render_scene(spec)
        with whole_folder(folder) as unfinished:
            as_image(scene.image).save(unfinished / "img.png")
            for place, number in enumerate(order):
                as_image(scene.masks[number : number + 1].float()).save(unfinished / f"mask{place}.png")
    return local_instances(folder, [spec.things[number].thing for number in order])


def learn(name: str, seed: int, number: int | None, given: list[str]) -> Path:
    """The result of a whole scene, or of its thing `number` alone."""
    folder = OUTPUT / f"{name}-{seed}" / ("together" if number is None else f"alone-{number}")
    if not (folder / "learned").is_dir():
        instances = [f"instances={name}"]
        if number is not None:
            instances = local_instances(photo(name, number), [read_scene(name).things[number].thing])
        own = _without(given, "synthesis", "guidance", "layout")
        mifo.learn(*instances, *QUIET, f"seed={seed}", *own, folder=folder)
    return folder


def score(name: str, seed: int, how: str, given: list[str]) -> dict[str, object]:
    """The scores of the pictures of a scene that was learned `together` or `apart`, or drawn `alone`."""
    tokens = [f"<asset{number}>" for number in range(len(read_scene(name).things))]
    numbers = [None] if how == "together" else range(len(tokens))
    results = [str(learn(name, seed, number, given)) for number in numbers]
    if how != "alone":
        learned = results if how == "apart" else results[0]
        found = [_score(name, seed, how, learned, [f"instances={name}"], [], given)]
    else:
        boxes = ARRANGEMENTS["spread"](tokens).values()
        found = [
            _score(
                name,
                seed,
                f"{how}-{number}",
                learned,
                judges(name, number),
                ["layout.arrange=null", f"layout.boxes.asset0={[*map(float, box)]}"],
                given,
            )
            for number, (learned, box) in enumerate(zip(results, boxes, strict=True))
        ]
    means = pd.DataFrame(found).mean().to_dict()
    return {"scene": name, "seed": seed, "learned": how} | means


def _score(
    name: str, seed: int, how: str, learned: Any, judges: list[str], layout: list[str], given: list[str]
) -> dict[str, float]:
    folder = OUTPUT / f"{name}-{seed}"
    if not (folder / f"scores-{how}" / "scores.json").is_file():
        pictures = mifo.synthesize(
            "layout=benchmark",
            *layout,
            "synthesis.samples=1",
            f"seed={seed}",
            *_without(given, "learning", "penalty", "method", "trainer"),
            learned=learned,
            folder=folder / f"pictures-{how}",
        )
        mifo.evaluate(*judges, *QUIET[:1], pictures=pictures, folder=folder / f"scores-{how}")
    found = Evaluation.read(folder / f"scores-{how}" / "scores.json").scores
    return {each.metric: each.value for each in found}


def table(runs: pd.DataFrame) -> str:
    """Means over scenes, whose seeds are averaged first, and paired differences with their 95 % intervals."""
    means = runs.groupby(["scene", "learned"])[METRICS].mean().unstack("learned")
    lines = ["| | together | apart | alone | apart − together | apart − alone |"]
    lines += ["| --- " * 6 + "|"]
    for metric in METRICS:
        found = means[metric]
        cells = [f"{found[how].mean():.3f}" for how in HOW]
        for other in ("together", "alone"):
            difference = found["apart"] - found[other]
            half = f" ± {stats.t.ppf(0.975, len(found) - 1) * difference.sem():.3f}" if len(found) > 1 else ""
            cells.append(f"{difference.mean():+.3f}{half}")
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    own = {"workers": "1", "seeds": "0,1,2", "scenes": "alike_*"}
    own |= dict(each.split("=", 1) for each in arguments if each.split("=")[0] in own)
    given = [each for each in arguments if each.split("=")[0] not in own]
    found = named_scenes(own["scenes"].split(","))
    if not several_things(found):
        raise MifoError(f"scenes={own['scenes']}: one thing alone cannot be learned apart; try alike_*")
    scenes = [scene.name for scene in found]
    pairs = list(product(scenes, map(int, own["seeds"].split(","))))
    learning = [
        (name, seed, number, given)
        for name, seed in pairs
        for number in (None, *range(len(read_scene(name).things)))
    ]
    # before the processes begin, of which several would draw the same picture
    for name in scenes:
        for number in range(len(read_scene(name).things)):
            draw_alone(name, number)
            judges(name, number)
    with ProcessPoolExecutor(int(own["workers"]), get_context("spawn")) as pool:
        list(pool.map(learn, *zip(*learning, strict=True)))
        scoring = [(*pair, how, given) for pair in pairs for how in HOW]
        runs = pd.DataFrame(pool.map(score, *zip(*scoring, strict=True)))
    runs.round(4).to_csv(OUTPUT / "runs.csv", index=False)
    (OUTPUT / "table.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main(sys.argv[1:])
