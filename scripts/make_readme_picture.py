"""Draw the README's picture from a finished run: the learned image, and the last picture of each prompt.

Usage: python scripts/make_readme_picture.py outputs/run/DATE_TIME [docs/images/demo.png]
"""

import sys
from pathlib import Path

from omegaconf import OmegaConf
from PIL import Image

from mifo.data.instances import read_instances
from mifo.data.saved_pictures import as_image, read_pictures
from mifo.data.settings import InstancesSettings
from mifo.report.drawing import draw_layout
from mifo.world.scenes import mask_boxes

SIDE, GAP = 560, 20


def main(run: Path, target: Path) -> None:
    instances = read_instances(InstancesSettings(**OmegaConf.load(run / "config.yaml").instances))
    pictures = read_pictures(run / "pictures")
    source = dict(zip(instances.tokens, mask_boxes(instances.masks).tolist(), strict=True))
    last = {each.prompt: each for each in pictures}
    panels = [
        (source, instances.image / 255),
        *((each.boxes, each.image) for each in last.values()),
    ]
    canvas = Image.new("RGB", (len(panels) * (SIDE + GAP) - GAP, SIDE), "white")
    for column, (boxes, image) in enumerate(panels):
        canvas.paste(
            draw_layout(boxes, as_image(image), size=SIDE).resize((SIDE, SIDE)), (column * (SIDE + GAP), 0)
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
    print(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "docs/images/demo.png"))
