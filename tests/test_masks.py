"""Masks in the forms that tools write: label images, COCO, boxes, files with names; and those made."""

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import tiny_segmenter

from mifo.config.compose import compose, settings_of, written
from mifo.config.launch import perform
from mifo.data.instances import read_instances
from mifo.data.photo_folder import folder_digest
from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError

CAR, CAT = (slice(4, 20), slice(2, 14)), (slice(10, 30), slice(16, 30))  # rows and columns of 32×32
EXAMPLES = Path(os.environ.get("MIFO_PHOTOGRAPHS", "/nowhere"))


def labels(first=1, second=2):
    found = np.zeros((32, 32), np.uint8)
    found[CAR], found[CAT] = first, second
    return found


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "img.png")
    return tmp_path


def read(folder):
    return read_instances(InstancesSettings(folder=str(folder)))


def check(found, names=None):
    expected = np.stack([labels() == 1, labels() == 2])
    assert torch.equal(found.masks, torch.from_numpy(expected).float())
    assert found.class_names == names and found.tokens == ("<asset0>", "<asset1>")


def coco(folder, segmentations, **annotation):
    rows = [
        {"image_id": 7, "category_id": i, "segmentation": each, **annotation}
        for i, each in enumerate(segmentations)
    ]
    names = [{"id": 0, "name": "car"}, {"id": 1, "name": "cat"}]
    image = {"id": 7, "height": 32, "width": 32, "file_name": "elsewhere/img.png"}
    content = {"images": [image], "annotations": rows, "categories": names}
    (folder / "instances_default.json").write_text(json.dumps(content))


def box_of(part):
    rows, columns = part
    return [columns.start, rows.start, columns.stop, rows.stop]


def test_a_label_image_of_indices_has_an_instance_for_each_value(folder, caplog):
    image = Image.fromarray(labels(3, 9), "P")
    image.putpalette([0, 0, 0] * 3 + [200, 0, 0] * 253)  # colours do not count
    image.putpixel((0, 31), 255)
    image.putpixel((0, 30), 77)
    image.save(folder / "labels.png")
    check(read(folder))
    assert "left out the values 77, 255, void or specks" in caplog.text
    assert len(folder_digest(InstancesSettings(folder=str(folder)))) == 12


def test_a_coloured_label_image_has_an_instance_for_each_colour(folder):
    colours = np.zeros((32, 32, 3), np.uint8)
    colours[CAR], colours[CAT] = (0, 0, 200), (200, 0, 0)
    Image.fromarray(colours).save(folder / "Segmentation.PNG")
    check(read(folder))


def test_polygons_and_run_lengths_of_coco(folder):
    pytest.importorskip("pycocotools")
    from pycocotools import mask

    polygons = []
    for part in (CAR, CAT):
        left, top, right, bottom = box_of(part)
        polygons.append([[left, top, right, top, right, bottom, left, bottom]])
    coco(folder, polygons)
    check(read(folder), ("car", "cat"))
    runs = [mask.encode(np.asfortranarray((labels() == i).astype(np.uint8))) for i in (1, 2)]
    coco(folder, [{**each, "counts": each["counts"].decode()} for each in runs])
    check(read(folder), ("car", "cat"))
    plain = []
    for i in (1, 2):
        flat = (labels() == i).flatten("F")
        edges = np.flatnonzero(np.diff(flat)) + 1
        plain.append({"size": [32, 32], "counts": np.diff([0, *edges, flat.size]).tolist()})
    coco(folder, plain)
    check(read(folder), ("car", "cat"))


def test_boxes_of_coco_end_at_the_border(folder):
    coco(folder, [None], bbox=[-5, 10, 15, 30])
    (mask,) = read(folder).masks
    assert mask.nonzero().tolist() == [[row, column] for row in range(10, 32) for column in range(10)]


@pytest.mark.parametrize("value", [[0], {"a": 1}])
def test_categories_of_coco_that_are_no_names_are_told(folder, value):
    left, top, right, bottom = box_of(CAR)
    coco(folder, [[[left, top, right, top, right, bottom, left, bottom]]], category_id=value)
    assert read(folder).class_names is None
    content = json.loads((folder / "instances_default.json").read_text())
    content["categories"][0]["name"] = value
    (folder / "instances_default.json").write_text(json.dumps(content))
    with pytest.raises(MifoError, match="a category is named"):
        read(folder)


def test_boxes_alone(folder):
    boxes = {name: [edge / 32 for edge in box_of(part)] for name, part in (("car", CAR), ("cat", CAT))}
    (folder / "boxes.yaml").write_text(yaml.safe_dump(boxes))
    check(read(folder), ("car", "cat"))
    (folder / "boxes.yaml").rename(folder / "boxes.json")
    (folder / "boxes.json").write_text(json.dumps({"thing": list(boxes.values())}))
    check(read(folder), ("thing", "thing"))


def test_files_with_the_names_of_their_instances(folder, caplog):
    for value, name in ((1, "car_1.png"), (2, "cat.webp")):
        Image.fromarray((labels() == value).astype(np.uint8) * 255).save(folder / name, lossless=True)
    Image.new("RGB", (32, 32), "red").save(folder / "preview.jpg")
    check(read(folder), ("car", "cat"))
    assert "left out, since no mask by their names: preview.jpg" in caplog.text


def numbered(folder):
    Image.fromarray(labels(255, 0)).save(folder / "mask0.png")
    Image.fromarray(labels()).save(folder / "labels.png")


def smooth(folder):
    Image.effect_noise((32, 32), 50).save(folder / "labels.png")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (numbered, r"several forms \(mask0\.png, labels\.png\); keep one"),
        (smooth, "values, so that its edges are smoothed"),
        (lambda f: Image.new("L", (32, 32)).save(f / "labels.png"), "labels.png marks nothing"),
        (lambda f: coco(f, []), "has no annotation of img.png"),
        (lambda f: coco(f, [[[1, 2, 3]]]), "damaged segmentation .a polygon of fewer"),
        (lambda f: coco(f, [{"size": [32, 32], "counts": [5]}]), "do not fill the picture"),
        (lambda f: coco(f, [{"size": [3, 3], "counts": "00"}]), r"run lengths of \[3, 3\]"),
        (lambda f: coco(f, [{"size": [32, 32], "counts": "0"}]), "damaged segmentation"),
        (lambda f: coco(f, [None], bbox=None), "neither a segmentation nor a box"),
        (lambda f: coco(f, [None], bbox=[1, 2]), "has a damaged box"),
        (lambda f: coco(f, [None], bbox=["a", 1, 2, 3]), "has a damaged box"),
        (lambda f: coco(f, [None], bbox=5), "has a damaged box"),
        (lambda f: coco(f, [None], bbox=[None, 1, 2, 3]), "has a damaged box"),
        (lambda f: coco(f, [None], bbox=[-50, -50, 30, 30]), "marks nothing"),
        (lambda f: (f / "boxes.yaml").write_text("car: [0, 0, 2, 1]"), "leaves the picture"),
        (lambda f: (f / "boxes.yaml").write_text("car: here"), "car has here, which is no box"),
        (lambda f: (f / "boxes.yaml").write_text("- 3"), "holds no boxes|not YAML"),
    ],
)
def test_damaged_forms_are_refused_by_name(folder, damage, sentence):
    damage(folder)
    with pytest.raises(MifoError, match=sentence):
        read(folder)


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the photographs are not here")
@pytest.mark.parametrize(("name", "count"), [("toy_car", 3), ("lizard", 2)])
def test_photographs_are_read_alike_in_every_form(tmp_path, name, count):
    original = read(EXAMPLES / name)
    assert len(original.tokens) == count
    hard = (original.masks > 0.5).numpy()
    apart = np.zeros(hard.shape[1:], np.uint8)
    for i, mask in enumerate(hard):
        apart[mask] = i + 1
    Image.fromarray(original.image.permute(1, 2, 0).numpy()).save(tmp_path / "img.png")
    Image.fromarray(apart).save(tmp_path / "labels.png")
    again = read(tmp_path)
    overlap = (again.masks.bool() & torch.from_numpy(hard)).sum((1, 2)) / torch.from_numpy(hard).sum((1, 2))
    assert len(again.tokens) == count and overlap.min() > 0.95


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return tiny_segmenter(tmp_path_factory.mktemp("sam2"))


def test_boxes_and_clicks_become_masks_that_can_be_learned(mifo, folder, segmenter, capsys):
    pointed = [
        "boxes={car: [0.1, 0.1, 0.6, 0.6]}",
        "points={car: [[0.3, 0.3], [0.9, 0.9, 0]], cat: [[0.7, 0.7]]}",
    ]
    place = "hydra.run.dir=" + written("it's Müll")
    assert mifo("masks", "picture=img.png", f"segmenter={segmenter}", *pointed, place) == 0
    told = capsys.readouterr().out
    assert "<asset0>  car" in told and "<asset1>  cat" in told and "class_names=[car,cat]" in told
    masks = [np.asarray(Image.open(folder / "it's Müll" / "photo" / f"mask{i}.png")) for i in (0, 1)]
    assert all(mask.shape == (32, 32) and {*np.unique(mask)} <= {0, 255} and mask.any() for mask in masks)
    assert Image.open(folder / "it's Müll" / "masks.png").size == (32, 32)
    learn = told.partition("learn: ")[2].splitlines()[0]
    assert mifo(*shlex.split(learn)[1:], "--cfg", "job") == 0
    settings = yaml.safe_load(capsys.readouterr().out)["instances"]
    assert settings["class_names"] == ["car", "cat"] and Path(settings["folder"], "mask1.png").is_file()
    assert mifo("masks", "instances=local", f"instances.folder={written(settings['folder'])}") == 0
    assert "of the picture" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "needs either picture=FILE"),
        (["picture=img.png"], "has no boxes and no points"),
        (["picture=img.png", "points={car: [[2, 0]]}"], "leaves the picture"),
        (["picture=img.png", "points={car: [[0.5, 0.5, 7]]}"], "is no click"),
        (["picture=img.png", "boxes={car: [0, 0, 1, 1]}", "segmenter=nowhere"], "segmenter=nowhere cannot"),
    ],
)
def test_what_cannot_be_segmented_is_refused(folder, monkeypatch, given, words):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it would try again for minutes
    with pytest.raises(MifoError, match=words):
        perform(settings_of(compose("masks", [*given, "paths.output=M"])))
