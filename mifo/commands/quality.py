"""`mifo quality`: how good the miniature is, each figure beside what it should at least be."""

import json
import platform
import time
from datetime import date
from importlib.metadata import version
from importlib.resources import files
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torchvision.utils import draw_bounding_boxes, make_grid

from mifo.acceleration.profile import available
from mifo.backbones.loading import load_model
from mifo.backbones.settings import ModelSettings
from mifo.commands.setup import prepare
from mifo.config.identity import code_version
from mifo.config.jobs import claim_folder
from mifo.config.schema import QualitySettings
from mifo.data.layouts import Layout
from mifo.data.saved_pictures import as_image
from mifo.errors import MifoError
from mifo.files import write_whole
from mifo.making.pictures import make_pictures
from mifo.miniature import quality as measures
from mifo.miniature.pretraining.segmenter import load_segmenter
from mifo.report.tables import markdown_table

SHEET = 24
"""Pictures of box control on the sheet."""


def quality(settings: QualitySettings) -> Path:
    """Measure the named parts; write `quality.json`, `quality.md` (after each) and `box_control.jpg`.

    Returns their folder. Raises MifoError for an unknown part or missing weights.
    """
    parts = {
        "reconstruction": _reconstruction,
        "evaluators": _evaluators,
        "text_to_image": _text_to_image,
        "box_control": _box_control,
    }
    unknown = [part for part in settings.parts if part not in parts]
    if unknown:
        raise MifoError(f"parts: '{unknown[0]}' is no part of quality; choose from {', '.join(parts)}")
    weights = (
        Path(settings.weights) if settings.weights else Path(str(files("mifo"))) / "miniature" / "weights"
    )
    if not (weights / settings.pipeline).is_dir():
        raise MifoError(
            f"weights={weights} holds no {settings.pipeline}/; name the folder weights/ of mifo pretrain"
        )
    device = prepare(settings)
    folder = claim_folder(settings)
    record: dict[str, dict[str, Any]] = {"about": about(device), "seconds": {}, "measured": {}}
    for part in settings.parts:
        began = time.perf_counter()
        record["measured"] |= parts[part](settings, weights, device, folder)
        record["seconds"][part] = round(time.perf_counter() - began, 1)
        write_whole(folder / "quality.json", json.dumps(record, indent=2) + "\n")
        write_whole(folder / "quality.md", report(record))
    print(report(record))
    print(f"quality: {folder}")
    return folder


def _reconstruction(settings: QualitySettings, weights: Path, device: torch.device, folder: Path) -> dict:
    pipeline = measures.load_pipeline(weights / settings.pipeline, device, torch.float32)
    return measures.reconstruction(pipeline, settings.reconstructions)


def _evaluators(settings: QualitySettings, weights: Path, device: torch.device, folder: Path) -> dict:
    return measures.evaluators(weights, device, settings.scenes, settings.per_category)


def _text_to_image(settings: QualitySettings, weights: Path, device: torch.device, folder: Path) -> dict:
    pipeline = measures.load_pipeline(weights / settings.pipeline, device, torch.float32)
    judge, synthesis = measures.Judge(weights / "clip", device), settings.synthesis
    return measures.text_to_image(
        pipeline, judge, settings.pictures, synthesis.guidance_scale, synthesis.steps
    )


def _box_control(settings: QualitySettings, weights: Path, device: torch.device, folder: Path) -> dict:
    model = load_model(ModelSettings("miniature", str(weights / settings.pipeline)), device)
    layouts: list[Layout] = []

    def make(prompts: list) -> torch.Tensor:
        layouts.extend(Layout(prompt, boxes) for prompt, boxes in prompts)
        # those with as many boxes one after the other, so that they share their CUDA graphs
        order = sorted(range(len(layouts)), key=lambda i: len(layouts[i].boxes))
        graphs = available(settings.performance, device).cuda_graphs
        made = make_pictures(
            model, [layouts[i] for i in order], settings.synthesis, settings.guidance, settings.seed, graphs
        )
        return torch.stack(
            [picture.image for _, picture in sorted(zip(order, made, strict=True), key=itemgetter(0))]
        )

    segmenter = load_segmenter(weights / "segmenter", device)
    measured, pictures = measures.box_control(segmenter, make, settings.box_prompts)
    shown = [
        draw_bounding_boxes(picture, torch.tensor(list(layout.boxes.values())) * picture.shape[-1])
        for picture, layout in zip(pictures[:SHEET], layouts, strict=False)
    ]
    as_image(make_grid(shown, nrow=6)).save(folder / "box_control.jpg", quality=85)
    return measured


def about(device: torch.device) -> dict[str, str]:
    """Where and when, and with which code and libraries."""
    named = [f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")]
    return {
        "date": date.today().isoformat(),
        "code": str(code_version()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "libraries": ", ".join([f"Python {platform.python_version()}", *named]),
    }


def processor() -> str:
    """The processor's name and how many threads torch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


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
