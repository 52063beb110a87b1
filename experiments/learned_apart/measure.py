"""Leakage of instances that were learned together, and learned apart and put together, on the miniature.

    python experiments/learned_apart/measure.py [workers=8] [seeds=0,1,2] [scenes=alike_two_cups] [KEY=VALUE]

Every instance of a drawn scene is drawn once more alone, in its place and on its background. The scene and
these pictures are learned with the same settings, the same layouts are made of both results, and the
instances of the scene judge both. Other keys are overrides of learning and synthesis. Finished runs are not
made again. outputs/learned_apart holds the runs and the record, runs.csv and table.md.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import yaml
from scipy import stats

import mifo
from mifo.config.location import conf_folder
from mifo.data.saved_pictures import as_image
from mifo.files import whole_folder
from mifo.metrics.evaluation import Evaluation
from mifo.world.scenes import redraw_scene, render_scene
from mifo.world.spec import SceneSpec, ThingSpec

OUTPUT = Path("outputs/learned_apart")
QUIET = ["logger=none", "callbacks=none"]
METRICS = [
    "leakage",
    "identification",
    "instance_consistency",
    "editability",
    "class_accuracy",
    "box_adherence",
]


def _without(given: list[str], *sections: str) -> list[str]:
    return [each for each in given if not each.startswith(sections)]


def read_scene(name: str) -> SceneSpec:
    scene = yaml.safe_load((conf_folder() / "instances" / f"{name}.yaml").read_text())["scene"]
    return SceneSpec(**scene | {"things": [ThingSpec(**thing) for thing in scene["things"]]})


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


def learn(name: str, seed: int, number: int | None, given: list[str]) -> Path:
    """The result of a whole scene, or of its thing `number` alone."""
    folder = OUTPUT / f"{name}-{seed}" / ("together" if number is None else f"alone-{number}")
    if not (folder / "learned").is_dir():
        thing = read_scene(name).things[number or 0].thing
        alone = [
            "instances=local",
            f"instances.folder={photo(name, number or 0)}",
            f"instances.class_names=[{thing}]",
            f"instances.initializers=[{thing}]",
        ]
        instances = [f"instances={name}"] if number is None else alone
        own = _without(given, "synthesis", "guidance", "layout")
        mifo.learn(*instances, *QUIET, f"seed={seed}", *own, folder=folder)
    return folder


def score(name: str, seed: int, how: str, given: list[str]) -> dict[str, object]:
    """The scores of the pictures of a scene that was learned `together` or `apart`."""
    folder = OUTPUT / f"{name}-{seed}"
    if not (folder / f"scores-{how}" / "scores.json").is_file():
        things = range(len(read_scene(name).things))
        learned = [learn(name, seed, number, given) for number in (things if how == "apart" else [None])]
        pictures = mifo.synthesize(
            "layout=benchmark",
            "synthesis.samples=1",
            f"seed={seed}",
            *_without(given, "learning", "penalty", "method", "trainer"),
            learned=[str(each) for each in learned] if how == "apart" else str(learned[0]),
            folder=folder / f"pictures-{how}",
        )
        mifo.evaluate(f"instances={name}", *QUIET[:1], pictures=pictures, folder=folder / f"scores-{how}")
    found = Evaluation.read(folder / f"scores-{how}" / "scores.json").scores
    return {"scene": name, "seed": seed, "learned": how} | {each.metric: each.value for each in found}


def table(runs: pd.DataFrame) -> str:
    """Means over scenes, whose seeds are averaged first, and the paired difference with its 95 % interval."""
    means = runs.groupby(["scene", "learned"])[METRICS].mean().unstack("learned")
    lines = ["| | together | apart | apart − together |", "| --- | --- | --- | --- |"]
    for metric in METRICS:
        both = means[metric]
        difference = both["apart"] - both["together"]
        half = f" ± {stats.t.ppf(0.975, len(both) - 1) * difference.sem():.3f}" if len(both) > 1 else ""
        cells = [f"{both[how].mean():.3f}" for how in ("together", "apart")]
        lines.append(f"| {metric} | {' | '.join(cells)} | {difference.mean():+.3f}{half} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    own = {"workers": "1", "seeds": "0,1,2", "scenes": ""}
    own |= dict(each.split("=", 1) for each in arguments if each.split("=")[0] in own)
    given = [each for each in arguments if each.split("=")[0] not in own]
    scenes = (
        own["scenes"].split(",")
        if own["scenes"]
        else sorted(p.stem for p in (conf_folder() / "instances").glob("alike_*"))
    )
    pairs = list(product(scenes, map(int, own["seeds"].split(","))))
    learning = [
        (name, seed, number, given)
        for name, seed in pairs
        for number in (None, *range(len(read_scene(name).things)))
    ]
    # before the processes begin, of which several would draw the same photo
    for name in scenes:
        for number in range(len(read_scene(name).things)):
            draw_alone(name, number)
    with ProcessPoolExecutor(int(own["workers"]), get_context("spawn")) as pool:
        list(pool.map(learn, *zip(*learning, strict=True)))
        scoring = [(*pair, how, given) for pair in pairs for how in ("together", "apart")]
        runs = pd.DataFrame(pool.map(score, *zip(*scoring, strict=True)))
    runs.round(4).to_csv(OUTPUT / "runs.csv", index=False)
    (OUTPUT / "table.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main(sys.argv[1:])
