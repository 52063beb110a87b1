"""`mifo synthesize`: pictures with the learned instances in their boxes."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mifo.acceleration.profile import available, ready_for_synthesis
from mifo.backbones.learned import load_learned, read_learned
from mifo.backbones.loading import load_model, load_outline
from mifo.backbones.shapes import load_shapes
from mifo.commands.setup import prepare, tell_memory
from mifo.config.jobs import claim_folder
from mifo.config.schema import RunSettings, SynthesizeSettings
from mifo.data.instance_names import instances_in
from mifo.data.instances import read_instances, save_side_by_side
from mifo.data.layouts import Layout, layouts
from mifo.data.saved_pictures import save_pictures
from mifo.errors import MifoError
from mifo.files import CONFIG, existing_folder, whole_folder, write_whole
from mifo.making.pictures import make_pictures
from mifo.making.together import joined_tokens, put_together
from mifo.method.prompts.instances import INSTANCE, check_placeholders, find_instances
from mifo.method.regions.boxes import check_boxes
from mifo.method.synthesis.sampler import sites_in_use
from mifo.training.memory import synthesis_memory


def learned_folder(given: str) -> Path:
    """The folder of a learned result, given itself or the run that holds it."""
    folder = existing_folder("learned", given, "what mifo learn or mifo run left")
    return folder / "learned" if (folder / "learned").is_dir() else folder


def synthesize(settings: SynthesizeSettings) -> Path:
    """Make `synthesis.samples` pictures of every prompt, unless they are there; returns their folder.

    Raises:
        MifoError: the run's folder holds pictures of other settings, or of unknown ones.
    """
    given = settings.learned if isinstance(settings.learned, list) else [settings.learned]
    if not given:
        raise MifoError("learned=[] names no folder; name one or several, as learned=[A,B]")
    sources = [learned_folder(str(each)) for each in given]
    results = [read_learned(source) for source in sources]
    tokens = joined_tokens(results)
    wanted = layouts(settings.layout, tokens)
    target = Path(settings.paths.output) / "pictures"
    finished = (target / "pictures.json").is_file()
    refuse_foreign(target)
    if not finished:
        check_layouts(settings, wanted, tokens)
        if len(results) > 1 and any(each.trainable != "tokens" for each in results):
            check_apart(settings, wanted)
    device = prepare(settings)
    claim_folder(settings)
    if finished:
        print(f"pictures: {target} (made before with the same settings, and kept)")
        return target
    if len(sources) == 1:
        record_instances(sources[0], target)
    else:
        record_joined(sources, target)
    if device.type == "cuda":
        shapes, performance = load_shapes(settings.model), available(settings.performance, device)
        tell_memory(synthesis_memory(shapes, settings.synthesis, settings.guidance, performance), device)
    model: Any = load_model(settings.model, device)
    if len(sources) == 1:
        load_learned(sources[0], model)
    else:
        model = put_together(model, sources)
    make_and_save(model, settings, wanted, target)
    print(f"pictures: {target}")
    return target


def refuse_foreign(pictures: Path) -> None:
    """Refuse a folder of pictures beside which no run has recorded its settings."""
    if pictures.is_dir() and any(pictures.iterdir()) and not (pictures.parent / CONFIG).is_file():
        raise MifoError(f"{pictures} already holds pictures, of unknown settings; choose another folder")


def make_and_save(
    model: Any, settings: SynthesizeSettings | RunSettings, wanted: Sequence[Layout], target: Path
) -> None:
    """Make the pictures of the layouts and save them in the folder `target`.

    `model` is a `DiffusionModel`, or several of them put together.
    """
    performance = available(settings.performance, model.device)
    for each in getattr(model, "members", [model]):
        ready_for_synthesis(each, performance)
    graphs = performance.cuda_graphs
    pictures = make_pictures(model, wanted, settings.synthesis, settings.guidance, settings.seed, graphs)
    save_pictures(target, pictures)


def record_instances(learned: Path, pictures: Path) -> None:
    """Record in the folder of pictures which instances they show, so that it can be scored anywhere.

    Called before the pictures are saved, so that finished ones never lack it. A record that is there stays.
    """
    record = pictures / "instances.yaml"
    if not record.is_file():
        instances = instances_in(learned / CONFIG, "instances")
        pictures.mkdir(parents=True, exist_ok=True)
        write_whole(record, OmegaConf.to_yaml(OmegaConf.create(asdict(instances))))


def check_apart(settings: SynthesizeSettings, wanted: Sequence[Layout]) -> None:
    """Refuse instances whose weights would act nowhere.

    Raises:
        MifoError: attention is not masked, or an instance of a prompt has no box.
    """
    for layout in wanted:
        without = [name for name in INSTANCE.findall(layout.prompt) if name not in layout.boxes]
        if without or not settings.guidance.masked:
            missing = f"{without[0]} has no box" if without else "guidance.masked is false"
            raise MifoError(
                f"weights that were learned apart act in the boxes of their instances, but {missing} in "
                f"'{layout.prompt}'; give each instance a box, and take guidance=mifo or guidance=masks."
            )


def record_joined(sources: Sequence[Path], pictures: Path) -> None:
    """Record the instances of several results as one picture of all, `instances/` beside the pictures."""
    apart = [read_instances(instances_in(source / CONFIG, "instances")) for source in sources]
    folder = pictures.parent / "instances"
    if not folder.is_dir():
        with whole_folder(folder) as unfinished:
            save_side_by_side(apart, unfinished)
    names = [name for each in apart for name in each.class_names or [""] * len(each.tokens)]
    record: dict[str, Any] = {
        "name": " and ".join(each.name for each in apart),
        "folder": str(folder.absolute()),
    }
    if all(names):
        record["class_names"] = names
    pictures.mkdir(parents=True, exist_ok=True)
    write_whole(pictures / "instances.yaml", OmegaConf.to_yaml(OmegaConf.create(record)))
    offset = 0
    for source, each in zip(sources, apart, strict=True):
        told = [f"<asset{offset + i}> is {token}" for i, token in enumerate(each.tokens)]
        print(f"{source}: {', '.join(told)}")
        offset += len(each.tokens)


def check_layouts(
    settings: SynthesizeSettings | RunSettings, wanted: Sequence[Layout], tokens: Sequence[str]
) -> None:
    """Refuse what the model cannot sample, before its weights are loaded.

    Raises:
        MifoError: a prompt that is too long or lacks the words of a box, a placeholder in the negative
            prompt, a box that holds no pixel of the shapes' grid once guidance.margin is taken off, layers or
            a number of steps that the model does not have.
    """
    check_placeholders("synthesis.negative_prompt", settings.synthesis.negative_prompt)
    outline = load_outline(settings.model)
    outline.add_words(tokens)
    outline.process.times(settings.synthesis.steps)
    outline.check_scale("synthesis.guidance_scale", settings.synthesis.guidance_scale)
    outline.words(settings.synthesis.negative_prompt)
    for layout in wanted:
        find_instances(layout.prompt, list(layout.boxes), outline.words)
    if any(layout.boxes for layout in wanted):
        _, shaping = sites_in_use(outline, settings.guidance)
        for layout in wanted:
            check_boxes(layout.boxes, shaping[0].size[0], settings.guidance.margin)
