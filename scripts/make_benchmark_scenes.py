"""Write the benchmark scenes into conf/instances; the same seed gives the same scenes.

    python scripts/make_benchmark_scenes.py

Three kinds: alike (one category, one colour word), mixed (categories and colours differ) and rare (hues
between two colour words, which no caption names). A scene is kept when its things are large, stay apart and
differ to the eye. Hues are held out of pretraining (`mifo.world.scenes.sample_identities`), so that no
scene was ever seen there.
"""

import random
from itertools import combinations
from pathlib import Path

import torch

from mifo.world.scenes import redraw_scene, render_scene
from mifo.world.spec import SceneSpec, ThingSpec
from mifo.world.vocabulary import BACKGROUNDS, COLOURS, PATTERNS, THINGS

SEED = 4
FOLDER = Path(__file__).parents[1] / "conf" / "instances"

COUNTS = (2, 2, 3, 3, 4)
"""Things of the five scenes of each kind."""

CENTRES = {
    2: ((0.27, 0.5), (0.73, 0.5)),
    3: ((0.26, 0.28), (0.74, 0.28), (0.5, 0.74)),
    4: ((0.26, 0.27), (0.74, 0.27), (0.26, 0.74), (0.74, 0.74)),
}
SIZES = {2: (0.23, 0.25), 3: (0.21, 0.23), 4: (0.2, 0.22)}
MOVE = 0.02
"""How far a centre may lie from its place, as a share of the picture's side."""

GAP = 0.025
"""Least distance of two things' boxes, as a share of the picture's side."""

SMALLEST = {2: 0.04, 3: 0.035, 4: 0.03}
"""Least share of the picture that a thing covers."""

LEAST_DIFFERENCE = 0.14
"""Least mean difference of two things' pixels, in [0, 1], drawn in the same pose and at the same place."""

UNNAMED_HUES = {"amber": 43, "lime": 78, "mint": 155, "azure": 200, "indigo": 251, "magenta": 298}
"""Hues between two colour words; their names stand in comments only."""

GROUND = {
    "boat": ("at the beach", "floating on top of water"),
    "fish": ("at the beach", "floating on top of water", "on top of a wooden floor"),
    "balloon": ("with a city in the background", "with a mountain in the background", "in the snow"),
    "rocket": ("with a city in the background", "in the snow", "with a mountain in the background"),
}
"""Backgrounds of things that do not stand anywhere."""


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean difference of two drawings on one background, over the pixels where either has something."""
    gap = (first - second).abs().mean(0)
    return (gap.sum() / (gap > 0).sum().clamp(min=1)).item()


def complaint(spec: SceneSpec) -> str | None:
    """What is wrong with a scene, or None."""
    scene = render_scene(spec)
    count = len(spec.things)
    if scene.masks.flatten(1).float().mean(1).min() < SMALLEST[count]:
        return "small"
    for a, b in combinations(scene.boxes.tolist(), 2):
        if max(a[0], b[0]) - min(a[2], b[2]) < GAP and max(a[1], b[1]) - min(a[3], b[3]) < GAP:
            return "overlap"
    if scene.boxes.min() < 0.01 or scene.boxes.max() > 0.99:
        return "cut"
    alone = [
        redraw_scene(spec, [slot], [(0.1, 0.1, 0.9, 0.9)], spec.background).image for slot in range(count)
    ]
    if any(difference(a, b) < LEAST_DIFFERENCE for a, b in combinations(alone, 2)):
        return "indistinct"
    return None


def things_of(kind: str, count: int, index: int, rng: random.Random) -> list[ThingSpec]:
    """Words of the things of one scene; places are filled in later."""
    if kind == "alike":
        thing, colour = rng.choice(THINGS), rng.choice(list(COLOURS))
        # every other scene shares the pattern too, so that only what no word names tells its things apart
        patterns = rng.sample(PATTERNS, count) if index % 2 else [rng.choice(PATTERNS)] * count
        return [ThingSpec(thing, colour, pattern) for pattern in patterns]
    if kind == "mixed":
        kinds, colours = rng.sample(THINGS, count), rng.sample(list(COLOURS), count)
        return [ThingSpec(t, c, rng.choice(PATTERNS)) for t, c in zip(kinds, colours, strict=True)]
    # rare: two or more things of one category, and unnamed hues that may repeat
    kinds = rng.sample(THINGS, 2)
    hues = rng.sample(list(UNNAMED_HUES.values()), 2)
    return [
        ThingSpec(kinds[slot // 2 % 2], pattern=rng.choice(PATTERNS[1:]), hue=float(hues[slot % 2]))
        for slot in range(count)
    ]


def make_scene(kind: str, count: int, index: int, rng: random.Random) -> SceneSpec:
    """Try words, places and seeds until a scene has nothing to complain of."""
    while True:
        things = things_of(kind, count, index, rng)
        options = [GROUND[thing.thing] for thing in things if thing.thing in GROUND]
        background = rng.choice(options[0] if options else BACKGROUNDS)
        for thing, (x, y) in zip(things, rng.sample(CENTRES[count], count), strict=True):
            thing.centre = (round(x + rng.uniform(-MOVE, MOVE), 3), round(y + rng.uniform(-MOVE, MOVE), 3))
            thing.size = round(rng.uniform(*SIZES[count]), 3)
        for seed in rng.sample(range(1000), 12):
            spec = SceneSpec(things, background, seed)
            if complaint(spec) is None:
                return spec


def described(spec: SceneSpec, kind: str) -> str:
    names = sorted({thing.thing for thing in spec.things})
    number = {2: "Two", 3: "Three", 4: "Four"}[len(spec.things)]
    if kind == "alike":
        return f"{number} look-alikes: {spec.things[0].colour} {names[0]}s"
    if kind == "mixed":
        return f"{number} different things: {', '.join(thing.thing for thing in spec.things)}"
    words = {hue: word for word, hue in UNNAMED_HUES.items()}
    shades = ", ".join(f"{words[int(thing.hue)]} {thing.thing}" for thing in spec.things)
    return f"{number} things in hues that no caption names: {shades}"


def as_yaml(name: str, spec: SceneSpec, kind: str) -> str:
    lines = [f"# Benchmark, {kind}. {described(spec, kind)}", f"name: {name}"]
    lines += [f"initializers: [{', '.join(thing.thing for thing in spec.things)}]", "scene:"]
    lines += [f"  background: {spec.background}", f"  seed: {spec.seed}", "  things:"]
    for thing in spec.things:
        colour = f"hue: {thing.hue:g}" if thing.hue is not None else f"colour: {thing.colour}"
        place = f"centre: [{thing.centre[0]:g}, {thing.centre[1]:g}], size: {thing.size:g}"
        lines.append(f"    - {{thing: {thing.thing}, {colour}, pattern: {thing.pattern}, {place}}}")
    return "\n".join(lines) + "\n"


def name_of(kind: str, spec: SceneSpec) -> str:
    kinds = list(dict.fromkeys(thing.thing for thing in spec.things))
    if len(kinds) == 1:
        number = {2: "two", 3: "three", 4: "four"}[len(spec.things)]
        return f"{kind}_{number}_{kinds[0] if kinds[0] == 'fish' else kinds[0] + 's'}"
    return f"{kind}_{'_'.join(kinds)}"


def benchmark() -> dict[str, str]:
    """File name → text of every scene of the set."""
    rng = random.Random(SEED)
    files: dict[str, str] = {}
    for kind in ("alike", "mixed", "rare"):
        used: set[str] = set()
        for index, count in enumerate(COUNTS):
            while True:
                spec = make_scene(kind, count, index, rng)
                name = name_of(kind, spec)
                # a category stands in one scene of its kind
                if not used & {thing.thing for thing in spec.things} or (
                    kind == "mixed" and f"{name}.yaml" not in files
                ):
                    break
            used |= {thing.thing for thing in spec.things}
            files[f"{name}.yaml"] = as_yaml(name, spec, kind)
    return files


if __name__ == "__main__":
    for file, text in benchmark().items():
        (FOLDER / file).write_text(text)
        print(FOLDER / file)
