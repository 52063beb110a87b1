r"""Settings of guidance, drawn at random: what each does to known words and to learned scenes.

    python experiments/guided_steps/search.py learned=A,B [settings=20] [seed=0] \
        [prompts=48] [box_seed=5001] [KEY=VALUE ...]
    python experiments/guided_steps/search.py fit=experiments/guided_steps/settings.csv

A and B are results of `mifo learn` of drawn scenes. Every setting makes one picture of each prompt of
`mifo quality`'s box control and of four prompts of each scene. Other keys are overrides of a run.
outputs/guided_steps holds settings-SEED.csv, which is written after each setting; processes with other seeds
can run at once. `fit` prints a linear fit of each measure to the settings, with standard errors.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.progress import track

from mifo.acceleration.profile import available
from mifo.backbones.learned import load_learned
from mifo.backbones.loading import load_model
from mifo.commands.quality import pictures_of
from mifo.commands.setup import prepare
from mifo.commands.synthesize import learned_folder
from mifo.config.compose import compose, settings_of
from mifo.data.instance_names import instances_in
from mifo.data.instances import read_instances
from mifo.data.layouts import Layout, layouts
from mifo.files import CONFIG, WEIGHTS
from mifo.making.pictures import make_pictures
from mifo.metrics.evaluation import PictureEvaluator
from mifo.miniature import quality
from mifo.miniature.pretraining.segmenter import load_segmenter
from mifo.world.scenes import caption
from mifo.world.vocabulary import BACKGROUNDS, THINGS

OUTPUT = Path("outputs/guided_steps")
ENDINGS = "layout.endings=[at the beach, in the jungle, in the snow, in the street]"
METRICS = ["instance_consistency", "class_accuracy_whole", "box_adherence", "editability", "leakage"]
CHOICES = {
    "guidance_scale": (3.5, 4, 4.5, 5, 6, 7),
    "guided_steps": (20, 25, 30),
    "iterations": (2, 3, 4, 5),
    "step_size_start": (4, 8, 12, 16, 20, 24),
    "step_size_end": (4, 8, 12, 16, 20, 24, 32),
    "self_weight": (0.5, 1.0),
    "penalty_scale": (1.0, 2.0),
}
BASE = {
    "guidance_scale": 4,
    "guided_steps": 25,
    "iterations": 3,
    "step_size_start": 16,
    "step_size_end": 16,
    "self_weight": 0.5,
    "penalty_scale": 1.0,
}
"""The setting at which the fit's constant stands."""

FITTED = "steps == 30 and shapes_from >= guided_steps and shapes_every == 5 and guidance_scale <= 7"
"""Settings near enough to each other for a linear fit."""


class KnownWords:
    """What is asked of pictures of known words in boxes, with the judges loaded once."""

    def __init__(self, prompts: int, seed: int, device: torch.device) -> None:
        self._prompts, self._seed = prompts, seed
        self._segmenter = load_segmenter(WEIGHTS / "segmenter", device)
        self._judge = quality.Judge(WEIGHTS / "clip", device)
        self._backgrounds = quality.boxed_scenes(prompts, seed).background

    def __call__(self, make: Callable[[list[Layout]], torch.Tensor]) -> dict[str, float]:
        """The shares of prompts with all things in their boxes, and with their background named right."""
        measured, _, pictures = quality.box_control(self._segmenter, make, self._prompts, 8, self._seed)
        texts = [caption([THINGS[0]], background) for background in BACKGROUNDS]
        named = self._judge.best(self._judge.pictures(pictures), texts).cpu() == self._backgrounds
        return {
            "box_control": measured["box control: all things in their boxes"]["value"],
            "background": named.float().mean().item(),
        }


def main(arguments: list[str]) -> None:
    own = {"learned": "", "settings": "20", "seed": "0", "prompts": "48", "box_seed": "5001", "fit": ""}
    own |= dict(each.split("=", 1) for each in arguments if each.split("=")[0] in own)
    if own["fit"]:
        fit(pd.read_csv(own["fit"]))
        return
    given = [each for each in arguments if each.split("=")[0] not in own]
    shared = ["layout=benchmark", ENDINGS, "synthesis.samples=1", "paths.output=unused"]
    run: Any = settings_of(compose("run", [*shared, *given]))
    device = prepare(run)
    graphs = available(run.performance, device).cuda_graphs
    evaluator = PictureEvaluator.from_settings(run.metrics, device)
    known_words = KnownWords(int(own["prompts"]), int(own["box_seed"]), device)
    plain = load_model(run.model, device)
    scenes = []
    for folder in map(learned_folder, filter(None, own["learned"].split(","))):
        model = load_model(run.model, device)
        load_learned(folder, model)
        instances = read_instances(instances_in(folder / CONFIG, "instances"))
        scenes.append((model, instances, layouts(run.layout, instances.tokens)))
    generator = np.random.default_rng(int(own["seed"]))
    rows = []
    for _ in track(range(int(own["settings"])), "settings"):
        chosen = {key: generator.choice(values).item() for key, values in CHOICES.items()}
        synthesis = replace(run.synthesis, guidance_scale=chosen["guidance_scale"])
        own_keys = {key: value for key, value in chosen.items() if key != "guidance_scale"}
        guidance = replace(run.guidance, **own_keys, shapes_from=chosen["guided_steps"])
        row = chosen | {
            "steps": synthesis.steps,
            "shapes_from": guidance.shapes_from,
            "shapes_every": guidance.shapes_every,
        }
        row |= known_words(partial(pictures_of, plain, synthesis, guidance, seed=run.seed, graphs=graphs))
        scores = [
            evaluator.evaluate(
                make_pictures(model, wanted, synthesis, guidance, run.seed, graphs, bar=False), instances
            ).scores
            for model, instances, wanted in scenes
        ]
        found = [{each.metric: each.value for each in of_scene} for of_scene in scores]
        rows.append(row | {metric: np.mean([each[metric] for each in found]) for metric in METRICS if found})
        OUTPUT.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).round(4).to_csv(OUTPUT / f"settings-{own['seed']}.csv", index=False)


def fit(rows: pd.DataFrame) -> None:
    """Print for each measure its value at `BASE`, and what one more of each setting adds to it."""
    rows = rows.query(FITTED)
    print(f"{len(rows)} settings")
    design = np.column_stack([np.ones(len(rows)), *(rows[key] - BASE[key] for key in BASE)])
    told = {}
    for measure in ("box_control", "background", *METRICS):
        values = rows[measure].to_numpy()
        estimates, *_ = np.linalg.lstsq(design, values)
        spread = ((values - design @ estimates) ** 2).sum() / (len(values) - design.shape[1])
        errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * spread)
        told[measure] = [f"{a:+.4f} ± {e:.4f}" for a, e in zip(estimates, errors, strict=True)]
    print(pd.DataFrame(told, index=["at the base", *BASE]).to_string())


if __name__ == "__main__":
    main(sys.argv[1:])
