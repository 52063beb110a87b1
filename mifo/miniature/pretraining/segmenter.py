"""The miniature's segmenter, the judge of place: which pixels belong to which category.

A small U-Net (Ronneberger et al., arXiv 1505.04597) trained on drawings and their true masks. It shares no
weight with the generator. Drawings are blurred, tinted and made noisy at random, so that made pictures, which
are softer than drawings, are read as well.
"""

import json
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mifo.errors import MifoError
from mifo.miniature.pretraining.augmentation import soften
from mifo.miniature.pretraining.corpus import CHUNK
from mifo.miniature.pretraining.settings import PretrainSettings
from mifo.miniature.pretraining.training import Pretraining
from mifo.world.scenes import SIZE, draw, sample_scenes
from mifo.world.vocabulary import THINGS

SIDE = SIZE // 2
"""Side in pixels of the pictures that are read and of the class maps."""

BACKGROUND = len(THINGS)
"""Class of the pixels that belong to no thing; the others are indices into THINGS."""


class Segmenter(nn.Module):
    """Pictures (n, 3, 64, 64) in [0, 1] → logits (n, 13, 64, 64) over the categories and the background."""

    def __init__(self, channels: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.down = nn.ModuleList(_block(i, o) for i, o in zip((3, *channels), channels, strict=False))
        joined = zip(channels[1:], channels, strict=False)
        self.up = nn.ModuleList(_block(below + beside, beside) for below, beside in joined)
        self.head = nn.Conv2d(channels[0], len(THINGS) + 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = images * 2 - 1
        levels: list[Tensor] = []
        for block in self.down:
            hidden = block(F.max_pool2d(hidden, 2) if levels else hidden)
            levels.append(hidden)
        for block, beside in zip(reversed(self.up), reversed(levels[:-1]), strict=True):
            hidden = block(torch.cat([F.interpolate(hidden, scale_factor=2), beside], 1))
        return self.head(hidden)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()]
    return nn.Sequential(*layers)


def draw_class_maps(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n pretraining scenes: pictures uint8 (n, 3, 64, 64) and their class maps uint8 (n, 64, 64)."""
    pictures, maps = [], []
    for start in track(range(0, n, CHUNK), "drawing scenes"):
        scenes = sample_scenes(min(CHUNK, n - start), generator)
        images, masks = draw(scenes)
        pictures.append((F.avg_pool2d(images, 2) * 255).round().to(torch.uint8))
        share, slot = F.avg_pool2d(masks, 2).max(1)
        thing = scenes.identities.thing.gather(1, slot.flatten(1)).view_as(slot)
        maps.append(torch.where(share > 0.5, thing, BACKGROUND).to(torch.uint8))
    return torch.cat(pictures), torch.cat(maps)


class SegmenterPretraining(Pretraining):
    """Cross-entropy of every pixel's class."""

    part = "segmenter"

    def __init__(self, settings: PretrainSettings, device: torch.device) -> None:
        super().__init__(Segmenter(), settings.segmenter, settings.seed)
        generator = torch.Generator(device).manual_seed(settings.seed + 29)
        self.pictures, self.maps = draw_class_maps(settings.scenes // 4, generator)

    def loss(self, generator: torch.Generator) -> dict[str, Tensor]:
        device, n = self.device, self.settings.batch_size
        rows = torch.randint(len(self.pictures), (n,), generator=generator, device=device)
        images, target = self.pictures[rows].float() / 255, self.maps[rows].long()
        images = soften(images, generator)
        return {"loss": F.cross_entropy(self.network(images).float(), target)}


def save_segmenter(model: Segmenter, folder: Path) -> None:
    """Write the weights in half precision, and the classes of the map."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"classes": [*THINGS, "background"], "side": SIDE}) + "\n")
    save_file(
        {name: value.half().contiguous() for name, value in model.state_dict().items()},
        folder / "model.safetensors",
    )


def load_segmenter(folder: Path, device: torch.device | str = "cpu") -> Segmenter:
    """Read what `save_segmenter` wrote. Raises MifoError where there is none."""
    file = folder / "model.safetensors"
    if not file.is_file():
        raise MifoError(f"{file} is missing; make it with mifo pretrain pretraining.parts=[segmenter].")
    model = Segmenter()
    model.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    return model.eval().requires_grad_(False).to(device)


@torch.no_grad()
def class_maps(model: Segmenter, images: Tensor, batch: int = 256) -> Tensor:
    """The class of every pixel (n, 64, 64) of pictures (n, 3, 128, 128) in [0, 1]."""
    device = next(model.parameters()).device
    small = F.interpolate(images.float(), (SIDE, SIDE), mode="area")
    return torch.cat([model(part.to(device)).argmax(1) for part in small.split(batch)])
