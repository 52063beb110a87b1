"""Scenes drawn by name: they are what the name says, repeat, and no table uses those for tuning."""

import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch

from mifo.config.compose import compose
from mifo.config.location import scenes_called
from mifo.data.instance_names import find_source, name_instances
from mifo.data.instances import read_instances
from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError
from mifo.files import read_yaml
from mifo.world.drawing import LEAST_DIFFERENCE, LEAST_VISIBLE, draw_spec
from mifo.world.drawn import BENCHMARK, TUNING, DrawnSettings, drawn_settings
from mifo.world.scenes import draw_things, redraw_scene, render_scene, scene_batch
from mifo.world.spec import SceneSpec, is_unseen
from mifo.world.vocabulary import COLOURS, HELD_OUT_HUES

NAMES = (*BENCHMARK[::5], *TUNING, "alike-10-hue36-other-apart-3", "mixed-10-overlapping-3")


def drawn(name: str) -> SceneSpec:
    return draw_spec(DrawnSettings(**drawn_settings(name)))


def around(first: float, second: float) -> float:
    """Degrees between two hues."""
    return abs((first - second + 180) % 360 - 180)


def test_the_benchmark_has_24_scenes_of_each_kind_with_2_to_5_things():
    assert len({*BENCHMARK, *TUNING}) == 72 + len(TUNING)
    for kind in ("alike", "mixed", "rare"):
        settings = [drawn_settings(name) for name in BENCHMARK if name.startswith(kind)]
        assert len(settings) == 24
        assert {each["count"] for each in settings} == {2, 3, 4, 5}
        places = [each["places"] for each in settings]
        assert {places.count(place) for place in places} == {8}


def test_no_table_uses_a_scene_for_tuning():
    folder = Path(__file__).parents[1] / "experiments"
    used = {
        scene
        for file in folder.glob("*/table.yaml")
        for patterns in read_yaml(file)["scenes"].values()
        for pattern in patterns
        for scene in scenes_called(pattern)
    }
    seeds = {drawn_settings(name)["seed"] for name in used if drawn_settings(name)}
    assert seeds and not seeds & {drawn_settings(name)["seed"] for name in TUNING}


@pytest.mark.parametrize("name", NAMES)
def test_a_scene_is_what_its_name_says(name):
    said, spec = drawn_settings(name), drawn(name)
    scene = render_scene(spec)
    assert len(spec.things) == len(scene.masks) == said["count"]
    assert all(is_unseen(thing.hue) for thing in spec.things if thing.hue is not None)
    if said["kind"] == "alike":
        hues = sorted(thing.hue for thing in spec.things)
        assert len({thing.thing for thing in spec.things}) == 1
        # the nearest hue that pretraining never saw may lie half a range of a colour word aside
        wanted = said["hue_distance"]
        gaps = [around(*pair) for pair in pairwise([*hues, hues[0]])]
        assert max(sorted(gaps)[:-1]) <= 2 * wanted + 18 * (wanted > 0)
        assert (len(set(hues)) == 1) == (wanted == 0)
        patterns = {thing.pattern for thing in spec.things}
        assert len(patterns) == (1 if said["pattern"] == "same" else min(4, said["count"]))
    elif said["kind"] == "mixed":
        assert len({thing.thing for thing in spec.things}) == said["count"]
    else:
        assert len({thing.thing for thing in spec.things}) == min(2, (said["count"] + 1) // 2)
    boxes = [
        max(max(a[0], b[0]) - min(a[2], b[2]), max(a[1], b[1]) - min(a[3], b[3]))
        for a, b in combinations(scene.boxes.tolist(), 2)
    ]
    pixel = 1 / 128
    if said["places"] == "apart":
        assert min(boxes) > 0.04 - 2 * pixel
    if said["places"] == "touching":
        assert abs(min(boxes)) < 3 * pixel
    if said["places"] == "overlapping":
        assert min(boxes) < -3 * pixel
    assert scene.boxes.min() > 0 and scene.boxes.max() < 1


def test_things_of_a_scene_differ_to_the_eye_and_stay_visible():
    name = "alike-5-hue0-same-overlapping-1"
    spec = drawn(name)
    alone = [redraw_scene(spec, [slot], [(0.1, 0.1, 0.9, 0.9)], spec.background).image for slot in range(5)]
    for a, b in combinations(alone, 2):
        gap = (a - b).abs().mean(0)
        # in another pose, so that a little less is allowed
        assert gap.sum() / (gap > 0).sum() > 0.8 * LEAST_DIFFERENCE
    batch = scene_batch(spec)
    whole = draw_things(batch.identities[0], batch.placements[0], 128)[1].sum((-2, -1))
    shares = render_scene(spec).masks.sum((-2, -1)) / whole
    assert shares.min() > 0.95 * LEAST_VISIBLE and shares.min() < 0.95  # something is hidden


def test_a_name_is_one_scene_however_its_numbers_are_typed():
    name = "alike-3-hue12-other-touching-9"
    asked = compose("layout", [f"instances={name}"]).instances
    draw_spec.cache_clear()
    composed = find_source(InstancesSettings(name=asked.name, scene=dict(asked.scene)))
    draw_spec.cache_clear()
    assert composed == drawn(name)


def test_a_name_is_an_option_that_repeats_in_every_process():
    name = "alike-3-hue12-other-touching-9"
    command = [
        sys.executable,
        "-c",
        f"from mifo.world.drawing import *; from mifo.world.drawn import *; "
        f"print(draw_spec(DrawnSettings(**drawn_settings('{name}'))))",
    ]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert told == str(drawn(name))
    composed = compose("layout", [f"instances={name}"]).instances
    settings = InstancesSettings(name=composed.name, scene=dict(composed.scene))
    names, classes = name_instances(settings), {thing.thing for thing in drawn(name).things}
    assert {*names.class_names} == {*names.initializers} == classes
    assert torch.equal(read_instances(settings).masks > 0.5, render_scene(drawn(name)).masks)
    assert str(drawn(name)) != str(drawn(name.replace("-9", "-10")))


def test_scenes_are_found_by_patterns_and_by_their_own_names():
    assert len(scenes_called("alike-*-same-*")) == 12
    assert scenes_called("alike-7-hue5-same-apart-3") == ["alike-7-hue5-same-apart-3"]
    assert scenes_called("alike-7") == scenes_called("tuning-*") == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("alike-3-apart-0", "kind=alike needs its likeness"),
        ("mixed-3-hue12-same-apart-0", "leave them out of kind=mixed"),
        ("mixed-11-apart-0", "take 2 to 10 things"),
        ("alike-10-hue40-same-apart-0", "more than the circle"),
    ],
)
def test_impossible_scenes_are_refused(name, told):
    with pytest.raises(MifoError, match=told):
        drawn(name)


def test_a_hue_is_unseen_between_colour_words_and_in_their_held_out_part():
    low, high = COLOURS["green"]
    held_out = low + (high - low) * sum(HELD_OUT_HUES) / 2
    assert is_unseen(held_out) and is_unseen(high + 1) and not is_unseen(low + 1)
