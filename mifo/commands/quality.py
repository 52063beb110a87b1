"""`mifo quality`: how good the miniature is, each figure with the least that it should reach."""

import json
import platform
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torchvision.utils import draw_bounding_boxes, make_grid

from mifo.acceleration.profile import available
from mifo.backbones.loading import load_model
from mifo.backbones.model import DiffusionModel
from mifo.backbones.settings import ModelSettings
from mifo.benchmark.records import device_name
from mifo.commands.setup import prepare
from mifo.config.identity import told_code
from mifo.config.jobs import claim_folder
from mifo.config.schema import QualitySettings
from mifo.data.layouts import Layout
from mifo.data.saved_pictures import as_image
from mifo.errors import MifoError, check_known
from mifo.files import WEIGHTS, write_whole
from mifo.making.pictures import make_pictures
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.synthesis.settings import SynthesisSettings
from mifo.miniature import quality as measures
from mifo.miniature.pretraining.segmenter import load_segmenter
from mifo.report.tables import markdown_table

JUDGES = {"evaluators": ("clip", "vit"), "text_to_image": ("clip",), "box_control": ("segmenter",)}
"""Folders beside the pipeline that a part needs."""

SHEET = 24
"""Pictures of box control on the sheet."""


def quality(settings: QualitySettings) -> Path:
    """Measure the named parts; write `quality.json`, `quality.md` (after each) and `box_control.jpg`.

    Returns their folder. Raises MifoError for an unknown part or for weights that a part lacks.
    """
    weights, synthesis = Path(settings.weights or WEIGHTS), settings.synthesis
    pipeline = weights / settings.pipeline
    if not pipeline.is_dir():
        raise MifoError(
            f"weights={weights} holds no {settings.pipeline}/; name the folder weights/ of mifo pretrain"
        )

    def text_to_image() -> dict[str, Any]:
        loaded = measures.load_pipeline(pipeline, device, torch.float32)
        judge = measures.Judge(weights / "clip", device)
        scale, steps = synthesis.guidance_scale, synthesis.steps
        return measures.text_to_image(loaded, judge, settings.pictures, scale, steps)

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "reconstruction": lambda: measures.reconstruction(
            measures.load_pipeline(pipeline, device, torch.float32), settings.reconstructions
        ),
        "evaluators": lambda: measures.evaluators(weights, device, settings.scenes, settings.per_category),
        "text_to_image": text_to_image,
        "box_control": lambda: _box_control(settings, weights, device, folder),
    }
    if not settings.parts:
        raise MifoError(f"parts=[] measures nothing; choose from {', '.join(parts)}")
    for part in settings.parts:
        check_known("parts", part, parts)
        if lost := [judge for judge in JUDGES.get(part, ()) if not (weights / judge).is_dir()]:
            raise MifoError(
                f"parts: {part} needs {weights / lost[0]}/; copy {WEIGHTS / lost[0]} there, "
                f"or leave {part} out"
            )
    device = prepare(settings)
    folder = claim_folder(settings)
    record: dict[str, dict[str, Any]] = {"about": about(device), "seconds": {}, "measured": {}}
    for part in settings.parts:
        began = time.perf_counter()
        record["measured"] |= parts[part]()
        record["seconds"][part] = round(time.perf_counter() - began, 1)
        write_whole(folder / "quality.json", json.dumps(record, indent=2) + "\n")
        write_whole(folder / "quality.md", report(record))
    print(report(record))
    print(f"quality: {folder}")
    return folder


def _box_control(settings: QualitySettings, weights: Path, device: torch.device, folder: Path) -> dict:
    model = load_model(ModelSettings("miniature", str(weights / settings.pipeline)), device)

    graphs = available(settings.performance, device).cuda_graphs
    make = partial(
        pictures_of, model, settings.synthesis, settings.guidance, seed=settings.seed, graphs=graphs
    )
    segmenter = load_segmenter(weights / "segmenter", device)
    seed = measures.BOX_SEED if settings.box_seed is None else settings.box_seed
    measured, layouts, pictures = measures.box_control(segmenter, make, settings.box_prompts, seed=seed)
    shown = [
        draw_bounding_boxes(picture, torch.tensor(list(layout.boxes.values())) * picture.shape[-1])
        for picture, layout in zip(pictures[:SHEET], layouts, strict=False)
    ]
    as_image(make_grid(shown, nrow=6)).save(folder / "box_control.jpg", quality=85)
    return measured


def pictures_of(
    model: DiffusionModel,
    synthesis: SynthesisSettings,
    guidance: GuidanceSettings,
    wanted: list[Layout],
    seed: int,
    graphs: bool,
) -> torch.Tensor:
    """One picture of each layout, (n, 3, H, W) in their order."""
    # layouts with as many boxes one after the other, so that they share their CUDA graphs
    ordered = sorted(wanted, key=lambda layout: len(layout.boxes))
    made = make_pictures(model, ordered, synthesis, guidance, seed, graphs)
    images = {id(layout): picture.image for layout, picture in zip(ordered, made, strict=True)}
    return torch.stack([images[id(layout)] for layout in wanted])


def about(device: torch.device) -> dict[str, str]:
    """Where and when, and with which code and libraries."""
    named = [f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")]
    return {
        "date": date.today().isoformat(),
        "code": told_code(),
        "device": device_name(device),
        "libraries": ", ".join([f"Python {platform.python_version()}", *named]),
    }


def figure(name: str, value: float) -> str:
    return f"{value:.2f} dB" if "psnr" in name else f"{value:.3f}"


def report(record: dict) -> str:
    """The record as Markdown: value, 95 % interval, number, target, and whether it is reached."""
    lines = ["# Quality of the miniature", "", "Scenes and prompts are held out of pretraining.", ""]
    lines += [f"- {key}: {value}" for key, value in record["about"].items()]
    lines += [f"- {part}: {seconds} s" for part, seconds in record["seconds"].items()]
    rows = []
    for name, found in record["measured"].items():
        target = measures.TARGETS.get(name)
        value, low, high = (figure(name, found[key]) for key in ("value", "low", "high"))
        reached = "" if target is None else "yes" if found["value"] >= target else "no"
        aim = "" if target is None else figure(name, target)
        rows.append([name, value, f"{low} – {high}", str(found["n"]), aim, reached])
    heads = ["what", "value", "95 % interval", "n", "at least", "reached"]
    return "\n".join([*lines, "", *markdown_table(pd.DataFrame(rows, columns=heads)), ""])
