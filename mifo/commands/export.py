"""`mifo export`: a learned result as files of other programs."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mifo.backbones.imported import merge_adapters
from mifo.backbones.kinds import Family, family_of
from mifo.backbones.latent import LatentModel
from mifo.backbones.learned import load_learned, read_learned
from mifo.backbones.loading import load_model, load_outline, model_folder
from mifo.backbones.model import DiffusionModel
from mifo.backbones.tokens import is_known
from mifo.commands.setup import prepare
from mifo.commands.synthesize import learned_folder
from mifo.config.jobs import claim_folder
from mifo.config.schema import ExportTaskSettings
from mifo.data.instance_names import instances_in
from mifo.data.instances import read_instances
from mifo.errors import MifoError
from mifo.exporting.card import card, thumbnail
from mifo.exporting.formats import holds, lora_name, lora_tensors, word_files
from mifo.exporting.low_rank import LowRank, low_rank
from mifo.exporting.pipeline import absent_parts, check_words, save_pipeline
from mifo.exporting.settings import exported_words
from mifo.files import CONFIG, refuse_existing, whole_folder, write_whole
from mifo.metrics.scores import SCORES, Evaluation, has_scores
from mifo.tensors import write_tensors

log = logging.getLogger(__name__)


def export(settings: ExportTaskSettings) -> Path:
    """Write words, weights and a model card into `exported/` of the run's folder; returns that folder.

    Raises:
        MifoError: no learned result, one of another base model, a word that the model knows, or a folder that
            holds an export.
    """
    source = learned_folder(settings.learned)
    learned = read_learned(source)
    words = exported_words(settings, learned.tokens)
    full = replace(settings.model, dtype="float32")
    family = family_of(model_folder(full, weights=False), full.t5)
    kind, absent = family.pipeline, absent_parts(family.pipeline, family.parts)
    if settings.weights != "pipeline":
        check_words(kind)
    outline = load_outline(full)
    taken = [word for word in words if is_known(outline.tokenizer, word)]
    if taken and settings.format == "diffusers":
        raise MifoError(
            f"words: the model knows '{taken[0]}' already; take a new word, such as my{taken[0]}."
        )
    device = prepare(settings)
    folder = claim_folder(settings) / "exported"
    refuse_existing(folder)
    model = load_model(full, device)
    load_learned(source, model)
    merge_adapters(model.networks)
    dtype = getattr(torch, settings.precision)
    with whole_folder(folder) as unfinished:
        files: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
        if settings.weights != "pipeline":
            files = word_files(model.new_rows, words, settings.format)
        for own in files.values():
            for name, tensors in own.items():
                write_tensors(unfinished / name, tensors)
        found = _write_lora(settings, model, unfinished, dtype) if settings.weights == "lora" else None
        if settings.weights == "pipeline":
            _write_pipeline(outline, model, words, family, unfinished / "pipeline", dtype)
        picture = _write_thumbnail(source, unfinished)
        scores = source.parent / SCORES
        scored = Evaluation.read(scores).scores if has_scores(scores) else ()
        text = card(settings, learned, words, files, kind, absent, found, scored, picture)
        write_whole(unfinished / "README.md", text)
    if found is not None:
        print(f"LoRA of rank {settings.rank}: lacks {found.error:.2%} of what the weights learned")
    print(f"exported: {folder}")
    return folder


def _write_lora(
    settings: ExportTaskSettings, model: DiffusionModel, folder: Path, dtype: torch.dtype
) -> LowRank | None:
    """The LoRA's file; none where words alone were learned."""
    # others' LoRA and words under the result are part of what the plain model lacks
    plain = replace(settings.model, dtype="float32", lora=None, words={})
    base = load_model(plain, model.device)
    place = partial(holds, settings.format)
    found = low_rank(model.networks, base.networks, settings.rank, dtype, place)
    if not found.factors:
        return None
    write_tensors(folder / lora_name(settings.format), lora_tensors(found, settings.format))
    return found


def _write_pipeline(
    outline: LatentModel,
    model: DiffusionModel,
    words: list[str],
    family: Family,
    folder: Path,
    dtype: torch.dtype,
) -> None:
    parts = {name: getattr(outline if name.startswith("tokenizer") else model, name) for name in family.parts}
    parts["scheduler"] = outline.noise_scheduler
    parts["force_zeros_for_empty_prompt"] = getattr(outline, "zero_empty_prompt", False)
    parts["is_distilled"] = outline.distilled
    for name in {*model.networks, "vae"}:
        parts[name] = torch.nn.Module.to(parts[name], dtype)
    save_pipeline(folder, family.pipeline, model.networks, parts, words)


def _write_thumbnail(source: Path, folder: Path) -> str | None:
    """The picture that was learned, if it is still where it was."""
    try:
        instances = read_instances(instances_in(source / CONFIG, "instances"))
    except MifoError as error:
        log.warning("The model card has no picture: %s", error)
        return None
    thumbnail(instances).save(folder / "thumbnail.jpg", quality=85)
    return "thumbnail.jpg"
