"""How well pictures of known words that describe an instance fit its prompts, beside the table's rows.

    python experiments/text_space/described.py [scenes=one_*] [seeds=0,1] [KEY=VALUE ...]

Each thing of a scene is drawn in the table's box on each of its backgrounds by colour, pattern and class
("yellow checked car"), and scored as the table's pictures are: against the prompt with the class alone.
Other keys are overrides of a run; scenes of several things take layout=benchmark, and no two things that
words describe alike. outputs/described holds runs.csv, which is written after each scene and seed.
"""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
from rich.progress import track

from mifo.backbones.loading import load_model
from mifo.commands.calibrate import drawn_spec, named_scenes
from mifo.commands.setup import prepare
from mifo.config.compose import compose, settings_of
from mifo.data.instances import read_instances
from mifo.data.layouts import Layout, layouts
from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError
from mifo.making.pictures import make_pictures
from mifo.metrics.evaluation import PictureEvaluator
from mifo.metrics.prompt_similarity import name_classes
from mifo.world.scenes import describe

OUTPUT = Path("outputs/described")
METRICS = ["editability", "instance_consistency", "class_accuracy_whole"]


def descriptions(scene: InstancesSettings) -> list[str]:
    """The words of each thing of a drawn scene; refuses two things that the same words describe."""
    told = [describe(each.thing, each.colour, each.pattern) for each in drawn_spec(scene).things]
    if len({*told}) < len(told):
        raise MifoError(f"{scene.name} has two things that the same words describe; leave it out of scenes.")
    return told


def main(arguments: list[str]) -> None:
    own = {"scenes": "one_*", "seeds": "0,1"}
    own |= dict(each.split("=", 1) for each in arguments if each.split("=")[0] in own)
    given = [each for each in arguments if each.split("=")[0] not in own]
    run = settings_of(
        compose("run", ["layout=benchmark_one", "synthesis.samples=1", "paths.output=unused", *given])
    )
    scenes = [(scene, descriptions(scene)) for scene in named_scenes(own["scenes"].split(","))]
    device = prepare(run)
    model = load_model(run.model, device)
    evaluator = PictureEvaluator.from_settings(run.metrics, device)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    rows = []
    asked = list(product(scenes, map(int, own["seeds"].split(","))))
    for (scene, words), seed in track(asked, "scenes and seeds"):
        instances = read_instances(scene)
        tokens = instances.tokens
        placed = layouts(run.layout, tokens)
        wanted = [
            Layout(
                name_classes(each.prompt, tokens, words),
                {word: each.boxes[token] for token, word in zip(tokens, words, strict=True)},
            )
            for each in placed
        ]
        made = make_pictures(model, wanted, run.synthesis, run.guidance, seed, bar=False)
        pictures = [
            replace(picture, prompt=each.prompt, boxes=each.boxes)
            for picture, each in zip(made, placed, strict=True)
        ]
        scores = {each.metric: each.value for each in evaluator.evaluate(pictures, instances).scores}
        row = {"instances": scene.name, "seed": seed, "words": ", ".join(words)}
        rows.append(row | {metric: scores[metric] for metric in METRICS})
        pd.DataFrame(rows).round(4).to_csv(OUTPUT / "runs.csv", index=False)
    print(pd.DataFrame(rows)[METRICS].mean().round(3))


if __name__ == "__main__":
    main(sys.argv[1:])
