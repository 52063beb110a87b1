"""Drawn pictures whose leakage is known, so that the measures can be compared with the truth.

Every case draws the things of a scene at the boxes of a layout on a new background.
"""

import torch

from mifo.data.layouts import Layout
from mifo.data.saved_pictures import Picture
from mifo.world.scenes import redraw_scene
from mifo.world.spec import SceneSpec

CASES = {
    "perfect": "every thing in its own box",
    "blend": "every thing in its own box, its colours half its own and half those of the next one",
    "colours": "every thing in its own box, in the colours of the next one",
    "swapped": "every thing in the box of the next one",
    "copies": "the first thing in every box",
    "strangers": "other things of the same words in the boxes",
}
"""What is drawn in each case.

`perfect` must score near 1 in consistency and identification and near 0 in leakage, `swapped` the reverse;
`copies` identifies 1/N and leaks (N − 1)/N, `blend` leaks about a half, and `colours` and `strangers` say
what the evaluator takes for identity: paint or shape, and these very things or any of their words.
"""

CASES_OF_ONE = ("perfect", "strangers")
"""The cases that need no second thing."""


def calibration_picture(spec: SceneSpec, case: str, layout: Layout, background: str, seed: int) -> Picture:
    """Draw `case` of the scene `spec`; `layout` has one box for each of its N things, in their order."""
    own = list(range(len(spec.things)))
    following = [*own[1:], own[0]]
    slots = {"swapped": following, "copies": [0] * len(own)}.get(case, own)
    if case == "strangers":
        spec = SceneSpec(spec.things, spec.background, spec.seed + 10_007)
    worn = {"colours": [following], "blend": [own, following]}.get(case, [None])
    places = list(layout.boxes.values())
    images = [redraw_scene(spec, slots, places, background, seed, colours).image for colours in worn]
    return Picture(torch.stack(images).mean(0), layout.prompt, layout.boxes, seed)


FAULTS = {
    "copies": "another thing of the scene stands in the box, and stands in its own box too",
    "swaps": "things stand in each other's boxes; every thing is there once",
    "missing": "nothing stands in the box",
}
"""What is wrong in a part of the boxes of `faulty_picture`."""


def faulty_picture(
    spec: SceneSpec, fault: str, wrong: int, layout: Layout, background: str, seed: int
) -> tuple[Picture, float]:
    """A picture in which `wrong` of the N boxes have a fault, and the share of boxes that have none.

    The boxes are drawn from `seed`. A single box cannot be swapped, so that it stays right; copies of the
    last right thing need one that is left, so that at most N − 1 boxes hold copies.
    """
    number = len(spec.things)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    wrong = {"copies": min(wrong, number - 1), "swaps": 0 if wrong == 1 else wrong}.get(fault, wrong)
    chosen, shown = order[:wrong], {slot: slot for slot in range(number)}
    if fault == "copies":
        shown |= dict.fromkeys(chosen, order[-1])
    elif fault == "swaps":
        shown |= dict(zip(chosen, [*chosen[1:], *chosen[:1]], strict=True))
    places = list(layout.boxes.values())
    kept = [box for box in shown if fault != "missing" or box not in chosen]
    image = redraw_scene(
        spec, [shown[box] for box in kept], [places[box] for box in kept], background, seed
    ).image
    return Picture(image, layout.prompt, layout.boxes, seed), 1 - wrong / number
