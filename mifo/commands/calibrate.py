"""`mifo calibrate`: the measures on drawn pictures whose leakage is known."""

import re
from pathlib import Path

import pandas as pd
import torch
from omegaconf import OmegaConf
from rich.progress import track
from scipy.stats import t as student

from mifo.commands.setup import prepare
from mifo.config.compose import compose
from mifo.config.jobs import claim_folder
from mifo.config.location import scenes_called
from mifo.config.schema import CalibrateSettings
from mifo.data.instance_names import find_source
from mifo.data.instances import read_instances
from mifo.data.layouts import LayoutSettings, layouts
from mifo.data.saved_pictures import as_image
from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError
from mifo.files import write_whole
from mifo.metrics.evaluation import METRICS, PictureEvaluator
from mifo.metrics.settings import Fit
from mifo.miniature.calibration import CASES, calibration_picture
from mifo.report.tables import markdown_table, write_csv
from mifo.world.scenes import SIZE
from mifo.world.spec import SceneSpec


def calibrate(settings: CalibrateSettings) -> Path:
    """Measure every case on every scene; write `pictures.csv`, `calibration.md`, `calibration.jpg`.

    Returns their folder. Raises MifoError when no scene fits the names or the folder holds a calibration.
    """
    scenes = named_scenes(settings.scenes)
    device = prepare(settings)
    folder = claim_folder(settings)
    if (folder / "pictures.csv").exists():
        raise MifoError(f"{folder} holds a calibration; choose another folder by hydra.run.dir=FOLDER")
    evaluator = PictureEvaluator.from_settings(settings.metrics, device)
    layout = LayoutSettings(endings=settings.endings, arrange="spread")
    rows, sheet = [], []
    for given in track(scenes, "calibration"):
        instances = read_instances(given)
        spec = find_source(given)
        assert isinstance(spec, SceneSpec)  # `named_scenes` gives nothing else
        placed = layouts(layout, instances.tokens)
        shown = [instances.image.float() / 255]
        for case in CASES:
            pictures = [
                calibration_picture(spec, case, each, ending, settings.seed + number)
                for number, (each, ending) in enumerate(zip(placed, settings.endings, strict=True))
            ]
            shown.append(pictures[0].image)
            about = {"scene": given.name, "things": len(instances.tokens), "case": case}
            found = evaluator.evaluate(pictures, instances).pictures
            rows += [
                {**about, "ending": ending, **scores}
                for ending, scores in zip(settings.endings, found, strict=True)
            ]
        sheet.append(torch.cat(shown, 2))
    table = pd.DataFrame(rows)
    markdown = report(table, evaluator, settings.metrics.fit)
    write_whole(folder / "calibration.md", markdown)
    as_image(torch.cat(sheet, 1)).save(folder / "calibration.jpg", quality=85)
    write_csv(folder / "pictures.csv", table, digits=5)  # the last, since it says that the rest is there
    print(markdown)
    print(f"calibration: {folder}")
    return folder


def named_scenes(patterns: list[str]) -> list[InstancesSettings]:
    """The drawn scenes whose names fit one of `patterns`, in which * is any text."""
    names = dict.fromkeys(name for pattern in patterns for name in scenes_called(pattern))
    schema = OmegaConf.structured(InstancesSettings)
    given = [compose("layout", [f"instances={name}"]).instances for name in names]
    scenes = [OmegaConf.to_object(OmegaConf.merge(schema, each)) for each in given if each.scene]
    if not scenes:
        raise MifoError(f"scenes={','.join(patterns)} fits no drawn scene; try [alike_*]")
    return scenes


def interval(values: pd.Series) -> str:
    """Mean ± t₀.₉₇₅·s/√n."""
    half = student.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{values.mean():.3f} ± {half:.3f}"


def report(table: pd.DataFrame, evaluator: PictureEvaluator, fit: Fit) -> str:
    """The table in Markdown: cases by metrics, all scenes and each kind of scene; scenes are the sample."""
    metrics = [name for name in METRICS if name in table]
    scenes = table.groupby(["case", "scene"], sort=False)[metrics].mean().reset_index()
    kinds = {
        "all scenes": "",
        **{kind: kind for kind in (re.split("[_-]", name)[0] for name in scenes.scene)},
    }
    heads = [f"{name} {'↑' if METRICS[name].higher_is_better else '↓'}" for name in metrics]
    lines = [
        "# The measures on drawn pictures",
        "",
        f"{SIZE}² drawings, {scenes.scene.nunique()} scenes, {len(table)} pictures; crops: {fit}; judged "
        f"by {evaluator.image.evaluator} and {evaluator.image_text.evaluator}. "
        "Mean ± 95 % interval over scenes.",
        "",
        *(f"- **{case}**: {about}" for case, about in CASES.items()),
    ]
    for title, start in kinds.items():
        part = scenes[scenes.scene.str.startswith(start)]
        rows = [
            [case, *(interval(part[part.case == case][metric].dropna()) for metric in metrics)]
            for case in CASES
        ]
        lines += ["", f"## {title}", "", *markdown_table(pd.DataFrame(rows, columns=["case", *heads]))]
    return "\n".join(lines) + "\n"
