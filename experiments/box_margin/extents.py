"""Whether things stay inside their boxes and fill them, in runs on scenes of the miniature.

    python experiments/box_margin/extents.py RUN ...
    python experiments/box_margin/extents.py table=RESULTS RUN ...

The miniature's segmenter finds each category's pixels, on a grid of 64 x 64. For each run: the share of them
outside of every box of their category; how far outside the 999th of 1,000 of them is, in pixels of 128, as
mean and maximum over pictures; and, where no two things are of one category, the mean IoU of a thing's extent
and its box. RESULTS are those of a table that made the runs: extents.csv is written there, a row for each
run. Printed are means and paired differences to the table's first row, with 95 % intervals.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.progress import track
from torchvision.ops import box_iou

from mifo.data.instance_names import instances_in, name_instances
from mifo.data.saved_pictures import Picture, read_pictures
from mifo.files import CONFIG, WEIGHTS
from mifo.miniature.pretraining.segmenter import SIDE, Segmenter, class_maps, load_segmenter
from mifo.miniature.quality import class_extents
from mifo.tables.collect import Measured, cells, differences
from mifo.world.scenes import SIZE
from mifo.world.vocabulary import THINGS

ROW = ["row", "scenes", "instances", "seed"]


def distances(picture: Picture, classes: np.ndarray, things: dict[str, int]) -> np.ndarray:
    """How far each pixel of the categories is from the nearest box of its own, in cells; 0 inside.

    Args:
        classes: (SIDE, SIDE), the category of each pixel. things: the category of each box.
    """
    down, across = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    found = []
    for thing in {*things.values()}:
        own = [np.array(box) * SIDE for name, box in picture.boxes.items() if things[name] == thing]
        outside = [
            np.maximum.reduce([x0 - across, across - x1, y0 - down, down - y1, np.zeros_like(down)])
            for x0, y0, x1, y1 in own
        ]
        found.append(np.minimum.reduce(outside)[classes == thing])
    return np.concatenate(found)


def extents(run: Path, segmenter: Segmenter) -> dict[str, float]:
    """The measures of one run; refuses one whose things have no class of the miniature."""
    names = name_instances(instances_in(run / CONFIG, "instances"))
    things = {
        token: THINGS.index(name) for token, name in zip(names.tokens, names.class_names or (), strict=True)
    }
    pictures = read_pictures(run / "pictures")
    maps = class_maps(segmenter, torch.stack([each.image for each in pictures]))
    far = [
        distances(picture, classes, things) for picture, classes in zip(pictures, maps.numpy(), strict=True)
    ]
    most = [np.quantile(each, 0.999) * SIZE / SIDE if each.size else 0.0 for each in far]
    measures = {
        "outside": np.mean([(each > 0.5).mean() if each.size else 0.0 for each in far]),
        "farthest": np.mean(most),
        "farthest_of_all": max(most),
    }
    if len({*things.values()}) == len(things):
        asked = torch.tensor([[things[name] for name in each.boxes] for each in pictures])
        boxes = torch.tensor([[*each.boxes.values()] for each in pictures])
        found = class_extents(maps, asked)
        overlaps = [box_iou(own, box).diagonal() for own, box in zip(found, boxes, strict=True)]
        measures["extent_iou"] = torch.cat(overlaps).mean().item()
    return measures


def main(arguments: list[str]) -> None:
    tables = [each.removeprefix("table=") for each in arguments if each.startswith("table=")]
    runs = [Path(each) for each in arguments if not each.startswith("table=")]
    segmenter = load_segmenter(WEIGHTS / "segmenter")
    found = pd.DataFrame({"folder": run.name, **extents(run, segmenter)} for run in track(runs, "runs"))
    measures = [name for name in found if name != "folder"]
    if not tables:
        print(found.to_string(index=False, float_format="{:.4f}".format))
        return
    for table in map(Path, tables):
        made = pd.read_csv(table / "runs.csv")[[*ROW, "folder"]].merge(found, on="folder")
        made.to_csv(table / "extents.csv", index=False, float_format="%.6f")
        measured = [
            Measured(*place, {name: row[name] for name in measures if not np.isnan(row[name])})
            for *place, row in zip(*(made[key] for key in ROW), made.to_dict("records"), strict=True)
        ]
        first = measured[0].row
        for told, estimates in (
            ("", cells(measured, measures)),
            (f"minus {first}", differences(measured, measures, first)),
        ):
            print(told)
            rows = {cell: {name: str(each) for name, each in own.items()} for cell, own in estimates.items()}
            print(pd.DataFrame(rows).T.fillna("").to_string())


if __name__ == "__main__":
    main(sys.argv[1:])
