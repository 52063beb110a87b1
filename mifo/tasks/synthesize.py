"""`mifo synthesize`: pictures with the learned instances in their boxes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.progress import Progress

from mifo.config.jobs import CONFIG, claim_folder
from mifo.config.layouts import Layout, layouts
from mifo.config.schema import RunSettings, SynthesizeSettings
from mifo.diffusion.ddim import ddim_timesteps
from mifo.diffusion.noise_schedule import NoiseSchedule
from mifo.errors import MifoError
from mifo.files import read_yaml, write_whole
from mifo.guidance.settings import GuidanceSettings
from mifo.metrics.pictures import Picture, save_pictures
from mifo.models.images import decode_latents
from mifo.models.learned import load_learned, read_learned
from mifo.models.loading import DiffusionModel, load_model, load_outline
from mifo.models.text import encode_prompts, tokenize
from mifo.models.tokens import add_words
from mifo.performance.profile import available, ready_for_synthesis
from mifo.prompts.instances import find_instances
from mifo.shapes.boxes import check_boxes
from mifo.synthesis.sampler import KeptPasses, Subject, layers_in_use
from mifo.synthesis.sampler import synthesize as sample_latents
from mifo.synthesis.settings import SynthesisSettings
from mifo.tasks.setup import prepare


def learned_folder(given: str) -> Path:
    """The folder of a learned result, given itself or the run that holds it."""
    folder = Path(given).expanduser()
    return folder / "learned" if (folder / "learned").is_dir() else folder


def synthesize(settings: SynthesizeSettings) -> Path:
    """Make `synthesis.samples` pictures of every prompt, unless they are there; returns their folder.

    Raises:
        MifoError: the run's folder holds pictures of other settings, or of unknown ones.
    """
    source = learned_folder(settings.learned)
    tokens = read_learned(source).tokens
    wanted = layouts(settings.layout, tokens)
    target = Path(settings.paths.output) / "pictures"
    finished = (target / "pictures.json").is_file()
    if finished and not (target.parent / CONFIG).is_file():
        raise MifoError(f"{target} already holds pictures, of unknown settings; choose another folder")
    if not finished:
        check_layouts(settings, wanted, tokens)
    device = prepare(settings)
    claim_folder(settings)
    record_instances(source, target)
    if finished:
        print(f"pictures: {target} (made before with the same settings, and kept)")
        return target
    model = load_model(settings.model, device)
    load_learned(source, model)
    performance = available(settings.performance, device)
    ready_for_synthesis(model, performance)
    pictures = make_pictures(
        model, wanted, settings.synthesis, settings.guidance, settings.seed, performance.cuda_graphs
    )
    save_pictures(target, pictures)
    print(f"pictures: {target}")
    return target


def record_instances(learned: Path, pictures: Path) -> None:
    """Record beside pictures which instances they show, so that they can be scored wherever they lie.

    Called before the pictures are saved, so that finished ones never lack it. A record that is there stays.
    """
    record = pictures / "instances.yaml"
    if not record.is_file():
        pictures.mkdir(parents=True, exist_ok=True)
        try:
            instances = read_yaml(learned / CONFIG)["instances"]
        except (KeyError, TypeError) as error:
            raise MifoError(
                f"{learned / CONFIG} is damaged: it does not say which instances it had"
            ) from error
        write_whole(record, OmegaConf.to_yaml(OmegaConf.create(instances)))


def check_layouts(
    settings: SynthesizeSettings | RunSettings, wanted: Sequence[Layout], tokens: Sequence[str]
) -> None:
    """Refuse what the model cannot sample, before its weights are loaded.

    Raises:
        MifoError: a prompt that is too long or lacks the words of a box, a box smaller than a pixel of the
            shapes' grid, layers or a number of steps that the model does not have.
    """
    outline = load_outline(settings.model)
    add_words(outline.tokenizer, tokens)
    ddim_timesteps(settings.synthesis.steps, NoiseSchedule.from_scheduler(outline.noise_scheduler))
    tokenize(outline.tokenizer, [settings.synthesis.negative_prompt])
    for layout in wanted:
        find_instances(outline.tokenizer, layout.prompt, list(layout.boxes))
    if any(layout.boxes for layout in wanted):
        *_, divisor = layers_in_use(outline.unet, settings.guidance)
        for layout in wanted:
            check_boxes(layout.boxes, outline.unet.config.sample_size // divisor)


def make_pictures(
    model: DiffusionModel,
    wanted: Sequence[Layout],
    settings: SynthesisSettings,
    guidance: GuidanceSettings,
    seed: int,
    graphs: bool = False,
    kept: KeptPasses | None = None,
) -> list[Picture]:
    """Pictures of every layout; picture j of a prompt starts from the noise of seed + j on every device.

    With `graphs` the U-Net's passes are replayed as CUDA graphs; `kept` hands them on to the next call with
    this model.
    """
    schedule = NoiseSchedule.from_scheduler(model.noise_scheduler, model.device)
    shape = (4, model.latent_size, model.latent_size)
    seeds = range(seed, seed + settings.samples)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(each)) for each in seeds])
    pictures, kept = [], kept or KeptPasses()
    with Progress() as progress:
        bar = progress.add_task("synthesis", total=len(wanted) * settings.steps)
        for layout in wanted:
            found = find_instances(model.tokenizer, layout.prompt, list(layout.boxes))
            prompts = [settings.negative_prompt] * len(noise) + [layout.prompt] * len(noise)
            latents = sample_latents(
                model.unet,
                schedule,
                encode_prompts(model, prompts).to(model.dtype),
                noise.to(model.device),
                [Subject(name, found.subjects[name], box) for name, box in layout.boxes.items()],
                found.filter_indices,
                found.eos_index,
                settings,
                guidance,
                seed,
                on_step=lambda report: progress.advance(bar),
                graphs=graphs,
                kept=kept,
            )
            images = decode_latents(model, latents)
            pictures += [
                Picture(image.cpu(), layout.prompt, layout.boxes, each)
                for image, each in zip(images, seeds, strict=True)
            ]
    return pictures
