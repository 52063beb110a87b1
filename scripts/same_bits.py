"""Run the demo with an earlier commit and with this tree, and compare words, weights and pictures by bits.

    python scripts/same_bits.py 04f7079                   # the demo of that time, some minutes
    python scripts/same_bits.py 04f7079 debug=default     # a few steps of everything

Behaviour that was changed on purpose is set alike for both. The scheduler of the miniature gets steps_offset
0, since earlier commits ignored the model's own offset; words start at a known word; k-means takes ten
starts; the prior has the weight, and stage 2 the rate, of today; class pictures are given, since earlier
commits made them with other attention processors, which round differently. The exit code is 1 if anything
differs.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from mifo.world.scenes import draw, sample_scenes

ROOT = Path(__file__).parents[1]
ALIKE = [
    "guidance.restarts=10",
    "instances.initializers=[car,car,car]",
    "learning.prior.weight=1",
    "learning.finetuning.learning_rate=2e-5",
    "metrics=none",
    "logger=none",
    "sheet=false",
]
# what experiment=demo had until 27 November 2026
DEMO = [
    "learning.semantic.steps=200",
    "learning.semantic.learning_rate=4e-3",
    "penalty.reward_steps=130",
    "synthesis.steps=30",
    "guidance.iterations=3",
    "guidance.step_size_start=8",
    "guidance.step_size_end=2",
]


def main() -> int:
    commit, *overrides = sys.argv[1:] or sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        model = shutil.copytree(ROOT / "mifo/miniature/weights/pipeline", folder / "model")
        scheduler = model / "scheduler" / "scheduler_config.json"
        scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"steps_offset": 0}))
        draw_class_pictures(folder / "class_pictures")
        before = folder / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(before), commit], check=True)
        try:
            for name, tree, then in (("old", before, []), ("new", ROOT, DEMO)):
                asked = overrides or ["experiment=demo", *then]
                places = [f"model.source={model}", f"learning.prior.folder={folder / 'class_pictures'}"]
                command = [sys.executable, "-m", "mifo", "run", *asked, *ALIKE, *places]
                command += [f"hydra.run.dir={folder / name / 'run'}", "device=cpu"]
                subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, check=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
        return compare(folder / "old" / "run", folder / "new" / "run")


def draw_class_pictures(folder: Path) -> None:
    """Ten drawings of the miniature's world."""
    folder.mkdir()
    pictures, _ = draw(sample_scenes(10, torch.Generator().manual_seed(0)))
    for number, picture in enumerate(pictures):
        to_pil_image(picture.clamp(0, 1)).save(folder / f"{number}.png")


def compare(old: Path, new: Path) -> int:
    """Print a line for each file; returns whether anything differs."""
    differing = 0
    for file in [*sorted(old.glob("learned/*.safetensors")), *sorted(old.glob("pictures/*.png"))]:
        name = file.relative_to(old)
        before, after = (tensors(folder / name) for folder in (old, new))
        same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        largest = max(
            float((before[k].float() - after[k].float()).abs().max()) for k in before.keys() & after.keys()
        )
        print(f"{name}: {'equal bit for bit' if same else f'differs by up to {largest:g}'}")
        differing += not same
    return int(differing > 0)


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name; a picture is one."""
    if file.suffix == ".png":
        return {"picture": pil_to_tensor(Image.open(file))}
    return load_file(file)


if __name__ == "__main__":
    sys.exit(main())
