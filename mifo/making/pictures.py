"""Pictures of prompts and their boxes."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from rich.progress import Progress
from torch import Tensor

from mifo.acceleration.graphs import GraphedFunction
from mifo.backbones.model import DiffusionModel
from mifo.data.layouts import Layout
from mifo.data.saved_pictures import Picture
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.prompts.instances import find_instances
from mifo.method.synthesis.sampler import Sampler
from mifo.method.synthesis.settings import SynthesisSettings


def picture_sampler(
    model: DiffusionModel, settings: SynthesisSettings, guidance: GuidanceSettings, graphs: bool
) -> Sampler:
    """A sampler of pictures; with `graphs` the network's passes are replayed as CUDA graphs."""
    return Sampler(model, settings, guidance, partial(GraphedFunction, wanted=graphs))


def start_noise(model: DiffusionModel, seeds: Iterable[int]) -> Tensor:
    """Noise (B, C, h, w) of these seeds, drawn on the processor: the same on every device."""
    drawn = [torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(model.device)


def make_pictures(
    model: DiffusionModel,
    wanted: Sequence[Layout],
    settings: SynthesisSettings,
    guidance: GuidanceSettings,
    seed: int,
    graphs: bool = False,
    sampler: Sampler | None = None,
    bar: bool = True,
) -> list[Picture]:
    """Pictures of every layout; picture j of a prompt starts from the noise of seed + j on every device.

    The `sampler` of an earlier call with the same model and settings keeps its CUDA graphs. Callers that make
    one picture after another turn the progress `bar` off.
    """
    seeds = range(seed, seed + settings.samples)
    noise = start_noise(model, seeds)
    sampler = sampler or picture_sampler(model, settings, guidance, graphs)
    pictures = []
    with Progress(disable=not bar) as progress:
        task = progress.add_task("synthesis", total=len(wanted) * settings.steps)
        for layout in wanted:
            prompts = [settings.negative_prompt] * len(noise) + [layout.prompt] * len(noise)
            latents = sampler(
                model.encode_prompts(prompts).to(model.dtype),
                noise,
                layout.boxes,
                find_instances(layout.prompt, list(layout.boxes), model.words),
                seed,
                on_step=lambda report: progress.advance(task),
            )
            pictures += [
                Picture(image.cpu(), layout.prompt, layout.boxes, each)
                for image, each in zip(model.decode_latents(latents), seeds, strict=True)
            ]
    return pictures
