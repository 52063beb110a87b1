"""`mifo calibrate`: the measures on drawn pictures whose leakage is known."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from omegaconf import OmegaConf
from rich.progress import track

from mifo.commands.setup import prepare
from mifo.config.jobs import claim_folder
from mifo.config.location import conf_folder, scenes_called
from mifo.config.schema import CalibrateSettings
from mifo.data.instance_names import find_source
from mifo.data.instances import InstanceSet, read_instances
from mifo.data.layouts import Layout, LayoutSettings, layouts
from mifo.data.saved_pictures import as_image
from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError
from mifo.files import read_yaml, write_whole
from mifo.metrics.evaluation import METRICS, PictureEvaluator, arrow
from mifo.metrics.settings import Fit
from mifo.miniature.calibration import CASES, CASES_OF_ONE, FAULTS, calibration_picture, faulty_picture
from mifo.report.tables import markdown_table, write_csv
from mifo.tables.collect import estimate
from mifo.world.drawn import drawn_option
from mifo.world.scenes import SIZE
from mifo.world.spec import SceneSpec


def calibrate(settings: CalibrateSettings) -> Path:
    """Measure every case on every scene; write `pictures.csv`, `faults.csv` and `calibration.{md,jpg}`.

    Scenes of one thing have the cases that need no other thing, and no faults, which are shares of the boxes.

    Returns their folder. Raises MifoError when no scene fits the names, some have one thing and others
    several, or the folder holds a calibration.
    """
    scenes = named_scenes(settings.scenes)
    several = several_things(scenes)
    device = prepare(settings)
    folder = claim_folder(settings)
    if (folder / "pictures.csv").exists():
        raise MifoError(f"{folder} holds a calibration; choose another folder by hydra.run.dir=FOLDER")
    evaluator = PictureEvaluator.from_settings(settings.metrics, device)
    layout = LayoutSettings(endings=settings.endings, arrange="spread")
    rows, faulty, sheet = [], [], []
    for given in track(scenes, "calibration"):
        instances = read_instances(given)
        spec = drawn_spec(given)
        placed = layouts(layout, instances.tokens)
        shown = [instances.image.float() / 255]
        for case in CASES if several else CASES_OF_ONE:
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
        if several:
            faulty += _faulty_rows(given.name, spec, placed, settings, evaluator, instances)
    table = pd.DataFrame(rows)
    markdown = report(table, evaluator, settings.metrics.fit)
    if faulty:
        blind = pd.DataFrame(faulty)
        markdown += report_correlations(blind)
        write_csv(folder / "faults.csv", blind, digits=5)
    write_whole(folder / "calibration.md", markdown)
    as_image(torch.cat(sheet, 1)).save(folder / "calibration.jpg", quality=85)
    write_csv(folder / "pictures.csv", table, digits=5)  # the last, since it says that the rest is there
    print(markdown)
    print(f"calibration: {folder}")
    return folder


def _faulty_rows(
    scene: str,
    spec: SceneSpec,
    placed: Sequence[Layout],
    settings: CalibrateSettings,
    evaluator: PictureEvaluator,
    instances: InstanceSet,
) -> list[dict[str, Any]]:
    """The scores and the truth of pictures of one scene with every fault in 0 to all of the boxes."""
    number = len(instances.tokens)
    about, pictures = [], []
    for fault in FAULTS:
        for wrong in range(number + 1):
            place = wrong % len(placed)
            seed = settings.seed + 1000 + wrong
            picture, right = faulty_picture(spec, fault, wrong, placed[place], settings.endings[place], seed)
            pictures.append(picture)
            about.append({"scene": scene, "fault": fault, "right": right})
    found = evaluator.evaluate(pictures, instances).pictures
    return [{**each, **scores} for each, scores in zip(about, found, strict=True)]


def report_correlations(table: pd.DataFrame) -> str:
    """Spearman's correlation of every measure with the share of right boxes, by fault, in Markdown."""
    metrics = [name for name in METRICS if name in table]
    rows = []
    for name in metrics:
        sign = 1 if METRICS[name].higher_is_better else -1
        found = []
        for fault in FAULTS:
            # within scenes, so that a scene that is easy for a measure does not count as agreement
            part = table[table.fault == fault]
            ranks = part.groupby("scene")[["right", name]].rank(pct=True)
            ranks -= ranks.groupby(part.scene).transform("mean")
            constant = ranks[name].abs().max() < 1e-9
            found.append(f"{0.0 if constant else sign * ranks['right'].corr(ranks[name]):.2f}")
        rows.append([name, *found])
    lines = [
        "",
        "## Which measure sees which fault",
        "",
        f"{len(table)} pictures in which 0 to all boxes have a fault. Spearman's correlation of each measure "
        "with the share of boxes that show their own thing, within scenes: 1 ranks as the truth does, 0 is "
        "blind, below 0 it prefers the fault. The sign is turned where lower is better.",
        "",
        *(f"- **{fault}**: {about}" for fault, about in FAULTS.items()),
        "",
        *markdown_table(pd.DataFrame(rows, columns=["measure", *FAULTS])),
    ]
    return "\n".join(lines) + "\n"


def named_scenes(patterns: list[str]) -> list[InstancesSettings]:
    """The drawn scenes whose names fit one of `patterns`, in which * is any text."""
    names = dict.fromkeys(name for pattern in patterns for name in scenes_called(pattern))
    schema = OmegaConf.structured(InstancesSettings)
    given = [drawn_option(name) or read_yaml(conf_folder() / f"instances/{name}.yaml") for name in names]
    scenes = [OmegaConf.to_object(OmegaConf.merge(schema, each)) for each in given if "scene" in each]
    if not scenes:
        raise MifoError(f"scenes={','.join(patterns)} fits no drawn scene; try [alike_*]")
    return scenes


def drawn_spec(scene: InstancesSettings) -> SceneSpec:
    """What is drawn in a scene of `named_scenes`, which gives no folders."""
    return cast(SceneSpec, find_source(scene))


def several_things(scenes: Sequence[InstancesSettings]) -> bool:
    """Whether the drawn scenes have several things each, not one; refuses a mixture."""
    alone = [each.name for each in scenes if len(drawn_spec(each).things) == 1]
    if alone and len(alone) < len(scenes):
        raise MifoError(
            f"scenes: {alone[0]} has one thing and others have several, which are measured otherwise; name "
            "them apart"
        )
    return not alone


def report(table: pd.DataFrame, evaluator: PictureEvaluator, fit: Fit) -> str:
    """The table in Markdown: cases by metrics, all scenes and each kind of scene; scenes are the sample."""
    metrics = [name for name in METRICS if name in table]
    scenes = table.groupby(["case", "scene"], sort=False)[metrics].mean().reset_index()
    kinds = {
        "all scenes": "",
        **{kind: kind for kind in (re.split("[_-]", name)[0] for name in scenes.scene)},
    }
    cases = {case: about for case, about in CASES.items() if case in set(table.case)}
    heads = [f"{name} {arrow(name)}" for name in metrics]
    lines = [
        "# The measures on drawn pictures",
        "",
        f"{SIZE}² drawings, {scenes.scene.nunique()} scenes, {len(table)} pictures; crops: {fit}; judged "
        f"by {evaluator.image.evaluator} and {evaluator.image_text.evaluator}. "
        "Mean ± 95 % interval over scenes.",
        "",
        *(f"- **{case}**: {about}" for case, about in cases.items()),
    ]
    for title, start in kinds.items():
        part = scenes[scenes.scene.str.startswith(start)]
        found = {case: part[part.case == case][metrics] for case in cases}
        rows = [
            [case, *(str(estimate(own[metric].dropna().tolist(), len(own), len(own))) for metric in metrics)]
            for case, own in found.items()
        ]
        lines += ["", f"## {title}", "", *markdown_table(pd.DataFrame(rows, columns=["case", *heads]))]
    return "\n".join(lines) + "\n"
