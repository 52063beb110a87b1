"""Drawn pictures whose truth is known, and what the measures are said to see of it."""

import pandas as pd
import pytest
import torch

from mifo.commands.calibrate import calibrate, named_scenes, report_correlations
from mifo.config.compose import compose, settings_of
from mifo.data.instance_names import find_source
from mifo.data.instances import read_instances
from mifo.data.layouts import LayoutSettings, layouts
from mifo.metrics.evaluation import PictureEvaluator
from mifo.metrics.settings import Fit, MetricsSettings
from mifo.miniature.calibration import faulty_picture


@pytest.fixture(scope="module")
def scene():
    (settings,) = named_scenes(["alike-4-hue40-other-apart-50"])
    instances = read_instances(settings)
    placed = layouts(LayoutSettings(endings=["in the snow"], arrange="apart"), instances.tokens)
    return find_source(settings), instances, placed[0]


@pytest.mark.parametrize(
    ("fault", "shares"),
    [
        ("copies", [1, 0.75, 0.5, 0.25, 0.25]),
        ("swaps", [1, 1, 0.5, 0.25, 0]),
        ("missing", [1, 0.75, 0.5, 0.25, 0]),
    ],
)
def test_faults_are_seen_by_the_measures_that_are_made_for_them(scene, fault, shares):
    spec, instances, layout = scene
    made = [faulty_picture(spec, fault, wrong, layout, "in the snow", 3) for wrong in range(5)]
    assert [right for _, right in made] == shares
    evaluator = PictureEvaluator.from_settings(MetricsSettings(fit=Fit.stretch))
    found = evaluator.evaluate([picture for picture, _ in made], instances).pictures
    identified = [row["identification"] for row in found]
    if fault != "missing":  # an empty box resembles some instance
        assert identified == pytest.approx(shares)
    is_lost = [0.0 if fault == "swaps" or share == 1 else 1.0 for share in shares]
    assert [row["missing"] for row in found] == is_lost
    assert [row["twice"] for row in found] == (is_lost if fault == "copies" else [0.0] * 5)


def test_a_picture_with_faults_repeats_and_changes_wrong_boxes_alone(scene):
    spec, _, layout = scene
    right, _ = faulty_picture(spec, "missing", 0, layout, "in the snow", 3)
    wrong, _ = faulty_picture(spec, "missing", 1, layout, "in the snow", 3)
    again, _ = faulty_picture(spec, "missing", 1, layout, "in the snow", 3)
    assert torch.equal(wrong.image, again.image)
    assert wrong.boxes == right.boxes == layout.boxes


def test_correlations_are_within_scenes_and_turned_where_lower_is_better():
    def rows(fault, scene, easy, sees):
        return [
            {
                "scene": scene,
                "fault": fault,
                "right": right,
                "identification": easy + right * sees,
                "leakage": easy - right,
                "missing": 0.0,
            }
            # ranks of scenes with other numbers of pictures have other means
            for right in ((0.0, 0.5, 1.0) if scene == "a" else (0.0, 0.25, 0.5, 0.75, 1.0))
        ]

    table = pd.DataFrame(
        [
            row
            for fault, sees in (("copies", 1), ("swaps", 1), ("missing", -1))
            for scene, easy in (("a", 0), ("b", 50))
            for row in rows(fault, scene, easy, sees)
        ]
    )
    told = [line.replace(" ", "") for line in report_correlations(table).splitlines()]
    assert "|identification|1.00|1.00|-1.00|" in told
    assert "|leakage|1.00|1.00|1.00|" in told
    assert "|missing|0.00|0.00|0.00|" in told


def test_scenes_of_one_thing_have_the_cases_that_need_no_other_thing(tmp_path):
    options = ["scenes=[one_cat]", "endings=[in the snow]", f"hydra.run.dir={tmp_path}"]
    calibrate(settings_of(compose("calibrate", [*options, f"paths.output={tmp_path}"])))
    found = pd.read_csv(tmp_path / "pictures.csv").set_index("case")
    assert list(found.index) == ["perfect", "strangers"]
    assert found.instance_consistency["perfect"] > 0.8 > found.instance_consistency["strangers"]
    assert not (tmp_path / "faults.csv").exists()
