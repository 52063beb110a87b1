"""The drawn world: the truth of a scene, what pretraining never sees, its words, the benchmark set."""

import importlib.util
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml
from torchvision.ops import box_iou

from mifo.config.location import conf_folder
from mifo.data.instances import read_instances
from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError
from mifo.miniature.pretraining.corpus import tokenise, tokenise_captions
from mifo.miniature.tokenizer import build_tokenizer
from mifo.world.scenes import (
    caption,
    captions,
    describe,
    draw,
    mask_boxes,
    redraw_scene,
    render_scene,
    sample_identities,
    sample_scenes,
    scene_batch,
)
from mifo.world.spec import SceneSpec, ThingSpec
from mifo.world.vocabulary import BACKGROUNDS, COLOURS, HELD_OUT_HUES, THINGS, words

SPEC = SceneSpec(
    [ThingSpec("car", "red", "striped"), ThingSpec("bird", "blue"), ThingSpec("cup", hue=78.0)],
    "in the snow",
    3,
)
BOXES = [(0.05, 0.1, 0.45, 0.5), (0.55, 0.1, 0.95, 0.5), (0.3, 0.5, 0.6, 0.95)]
BENCHMARK = sorted(
    path
    for kind in ("alike", "mixed", "rare")
    for path in (conf_folder() / "instances").glob(f"{kind}_*.yaml")
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def corpus():
    scenes = sample_scenes(48, torch.Generator().manual_seed(5))
    return scenes, *draw(scenes)


def test_scenes_repeat_and_differ_by_their_seed(corpus):
    again = draw(sample_scenes(48, torch.Generator().manual_seed(5)))
    other = draw(sample_scenes(48, torch.Generator().manual_seed(6)))
    assert torch.equal(corpus[1], again[0]) and torch.equal(corpus[2], again[1])
    assert not torch.equal(corpus[1], other[0])
    assert captions(corpus[0], 1) == captions(corpus[0], 1) != captions(corpus[0], 2)


def test_masks_are_true(corpus):
    """Repainting a thing in other colours changes the picture inside its mask and nowhere else."""
    scenes, images, masks = corpus
    repainted = sample_scenes(48, torch.Generator().manual_seed(5))
    for field in ("body", "second", "accent"):
        colours = getattr(repainted.identities, field)
        colours[:, 0] = 1 - colours[:, 0]
    changed = (draw(repainted)[0] - images).abs().amax(1)
    assert (changed[masks[:, 0] == 0] == 0).all()
    assert (changed.flatten(1).amax(1) > 0.1).all()
    empty = torch.arange(masks.shape[1]) >= scenes.count[:, None]
    assert (masks[empty] == 0).all() and (masks.sum(1) <= 1 + 1e-5).all()


def test_boxes_are_tight():
    masks = torch.zeros(2, 8, 8)
    masks[0, 2:5, 1:7] = 1
    assert mask_boxes(masks).tolist() == [[1 / 8, 2 / 8, 7 / 8, 5 / 8], [0, 0, 0, 0]]


@pytest.mark.parametrize("held_out", [False, True])
def test_hues_of_the_benchmark_are_held_out(held_out):
    identities = sample_identities((4000,), torch.Generator().manual_seed(1), held_out)
    high, low = identities.body.amax(-1), identities.body.amin(-1)
    red, green, blue = identities.body.unbind(-1)
    spread = high - low
    hue = torch.where(
        high == red,
        (green - blue) / spread,
        torch.where(high == green, (blue - red) / spread + 2, (red - green) / spread + 4),
    )
    ranges = torch.tensor(list(COLOURS.values()))[identities.colour]
    inside = ((hue * 60 - ranges[:, 0]) % 360) / (ranges[:, 1] - ranges[:, 0])
    assert inside.min() > -1e-3 and inside.max() < 1 + 1e-3
    between = (inside > HELD_OUT_HUES[0] - 1e-3) & (inside < HELD_OUT_HUES[1] + 1e-3)
    strictly = (inside > HELD_OUT_HUES[0] + 1e-3) & (inside < HELD_OUT_HUES[1] - 1e-3)
    assert between.all() if held_out else not strictly.any()


def test_every_word_of_the_world_is_one_token(tokenizer):
    for word in words():
        assert len(tokenizer(word).input_ids) == 3, word


def test_captions_are_read_alike_by_both_tokenisers(tokenizer, corpus):
    texts = captions(corpus[0], seed=2) + captions(corpus[0], seed=3)
    ids, slots = tokenise_captions(tokenizer, texts)
    assert torch.equal(tokenise(tokenizer, texts), ids) and (slots == -1).all()


def test_captions_name_the_things_and_the_background():
    scenes = sample_scenes(48, torch.Generator().manual_seed(5))
    for row, text in enumerate(captions(scenes, seed=2, drop=0.0)):
        count = int(scenes.count[row])
        kinds = sorted(THINGS[i] for i in scenes.identities.thing[row, :count].tolist())
        assert text.startswith("a photo of a") and text.endswith(BACKGROUNDS[int(scenes.background[row])])
        phrase = text.removesuffix(BACKGROUNDS[int(scenes.background[row])])
        assert sorted(word for word in phrase.split() if word in THINGS) == kinds


def test_a_spec_is_drawn_as_it_says():
    scene = render_scene(SPEC)
    things = [describe(thing.thing, thing.colour, thing.pattern) for thing in SPEC.things]
    assert (
        caption(things, SPEC.background)
        == "a photo of a red striped car and a blue bird and a cup in the snow"
    )
    assert torch.equal(scene.boxes, mask_boxes(scene.masks.float()))
    assert torch.equal(scene.image, render_scene(SPEC).image)
    placed = SceneSpec([ThingSpec("house", "green", centre=(0.3, 0.6), size=0.2)], "at the beach", 1)
    x0, y0, x1, y1 = render_scene(placed).boxes[0]
    assert (x0 + x1) / 2 == pytest.approx(0.3, abs=0.05) and (y0 + y1) / 2 == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize(
    ("things", "message"),
    [
        ([ThingSpec("tram", "red")], "thing 'tram' is not known"),
        ([ThingSpec("car", "beige")], "colour 'beige' is not known"),
        ([ThingSpec("car")], "colour 'None' is not known"),
        ([ThingSpec("car", "red", hue=78.0)], "give one of them"),
        ([ThingSpec("car", hue=355.0)], "inside 'red'"),
        ([ThingSpec("car", "red")] * 11, "11 things"),
    ],
)
def test_impossible_scenes_are_refused(things, message):
    with pytest.raises(MifoError, match=message):
        render_scene(SceneSpec(things, "in the snow"))


def test_things_are_redrawn_as_themselves_in_their_boxes():
    scene = redraw_scene(SPEC, [0, 1, 2], BOXES, "at the beach", seed=1)
    wanted = torch.tensor(BOXES)
    pixel = 1.5 / 128
    assert (scene.boxes[:, :2] > wanted[:, :2] - pixel).all() and (
        scene.boxes[:, 2:] < wanted[:, 2:] + pixel
    ).all()
    fits = ((scene.boxes - wanted).abs() < 2 * pixel).float().view(-1, 2, 2).prod(1).sum(1)
    assert (fits >= 1).all(), "each thing fills its box from edge to edge one way or the other"
    assert torch.equal(scene.image, redraw_scene(SPEC, [0, 1, 2], BOXES, "at the beach", seed=1).image)
    # the colours inside a mask are the identity's own
    body = scene_batch(SPEC).identities.body[0, 1]
    nearest = (scene.image[:, scene.masks[1]] - body[:, None]).abs().amax(0)
    assert (nearest < 0.12).float().mean() > 0.2


def test_colours_can_be_worn_by_another_thing():
    own = redraw_scene(SPEC, [0, 1], BOXES[:2], "at the beach", seed=1)
    worn = redraw_scene(SPEC, [0, 1], BOXES[:2], "at the beach", seed=1, colours=[1, 0])
    assert torch.equal(own.masks, worn.masks)
    body = scene_batch(SPEC).identities.body[0, 1]
    share = [
        ((s.image[:, s.masks[0]] - body[:, None]).abs().amax(0) < 0.12).float().mean() for s in (own, worn)
    ]
    assert share[0] < 0.02 < 0.15 < share[1]


def test_the_benchmark_is_complete():
    for kind in ("alike", "mixed", "rare"):
        scenes = [yaml.safe_load(path.read_text()) for path in BENCHMARK if path.name.startswith(kind)]
        assert len(scenes) >= 4
        assert {len(scene["scene"]["things"]) for scene in scenes} == {2, 3, 4}


def test_the_benchmark_is_made_by_its_script():
    spec = importlib.util.spec_from_file_location(
        "make_benchmark_scenes", Path(__file__).parents[1] / "scripts" / "make_benchmark_scenes.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.benchmark()
    assert {path.name: path.read_text() for path in BENCHMARK} == made


@pytest.mark.parametrize("path", BENCHMARK, ids=lambda path: path.stem)
def test_scenes_of_the_benchmark_hold_what_their_kind_says(path):
    scene = yaml.safe_load(path.read_text())
    assert scene["name"] == path.stem
    things = scene["scene"]["things"]
    instances = read_instances(InstancesSettings(name=scene["name"], scene=scene["scene"]))
    assert instances.masks.flatten(1).mean(1).min() > 0.03
    boxes = mask_boxes(instances.masks)
    assert all(box_iou(boxes[[a]], boxes[[b]]) == 0 for a, b in combinations(range(len(things)), 2))
    if path.name.startswith("alike"):
        assert len({(thing["thing"], thing["colour"]) for thing in things}) == 1
    elif path.name.startswith("mixed"):
        assert (
            len({thing["thing"] for thing in things})
            == len({thing["colour"] for thing in things})
            == len(things)
        )
    else:
        assert all("hue" in thing and "colour" not in thing for thing in things)
