"""How far the things of a run's pictures leave their boxes, where all are of one category, as in the demo.

    python experiments/guided_steps/outside.py outputs/run/DATE_TIME ...

The miniature's segmenter finds the category's pixels, on a grid of 64 x 64. Printed for each run:
the share of them that lies outside of every box, and the pixels of 128 between a box and the 999th of 1,000
of them.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from mifo.data.instance_names import instances_in
from mifo.data.saved_pictures import read_pictures
from mifo.files import CONFIG, WEIGHTS
from mifo.miniature.pretraining.segmenter import SIDE, class_maps, load_segmenter
from mifo.world.scenes import SIZE
from mifo.world.vocabulary import THINGS


def main(runs: list[str]) -> None:
    segmenter = load_segmenter(WEIGHTS / "segmenter")
    down, across = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    for run in map(Path, runs):
        (thing,) = {*(instances_in(run / CONFIG, "instances").class_names or ())}
        pictures = read_pictures(run / "pictures")
        found = class_maps(segmenter, torch.stack([each.image for each in pictures]))
        shares, farthest = [], []
        for picture, classes in zip(pictures, found.numpy(), strict=True):
            sides = [
                np.maximum.reduce([x0 - across, across - x1, y0 - down, down - y1, np.zeros_like(down)])
                for x0, y0, x1, y1 in np.array(list(picture.boxes.values())) * SIDE
            ]
            distances = np.minimum.reduce(sides)[classes == THINGS.index(thing)]
            shares.append((distances > 0.5).mean())
            farthest.append(np.quantile(distances, 0.999) * SIZE / SIDE)
        told = f"{np.mean(farthest):.1f} pixels, at most {max(farthest):.1f}"
        print(f"{run}: {np.mean(shares):.3f} outside, {told}")


if __name__ == "__main__":
    main(sys.argv[1:])
