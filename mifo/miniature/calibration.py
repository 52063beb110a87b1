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


def calibration_picture(
    spec: SceneSpec, case: str, layout: Layout, background: str, seed: int = 0
) -> Picture:
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
