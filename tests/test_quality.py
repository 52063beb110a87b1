"""The quality of the miniature: intervals, box control on pictures whose truth is known, the report."""

import pytest
import torch
from scipy.stats import binomtest

from mifo.commands.quality import quality, report
from mifo.config.compose import compose, settings_of
from mifo.errors import MifoError
from mifo.method.prompts.instances import check_instances
from mifo.miniature.pretraining.segmenter import BACKGROUND
from mifo.miniature.quality import (
    box_control,
    boxed_layouts,
    boxed_scenes,
    drawn_extents,
    mean,
    share,
)
from mifo.world.scenes import draw, mask_boxes
from mifo.world.vocabulary import THINGS


class Oracle(torch.nn.Module):
    """A segmenter that reads the class of every pixel from the picture's red channel."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images):
        classes = (images[:, 0] * 100).round().long().clamp(max=len(THINGS))
        return torch.nn.functional.one_hot(classes, len(THINGS) + 1).movedim(-1, 1).float()


def paint(*things, side=128):
    """A picture for the oracle: (category, x0, y0, x1, y1) in shares of the side."""
    picture = torch.full((3, side, side), BACKGROUND / 100)
    for thing, *box in things:
        x0, y0, x1, y1 = (round(edge * side) for edge in box)
        picture[:, y0:y1, x0:x1] = thing / 100
    return picture


@pytest.mark.parametrize(("hits", "n"), [(3, 40), (40, 40), (0, 7)])
def test_shares_have_wilsons_interval(hits, n):
    found = share(torch.arange(n) < hits)
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert (found["value"], found["n"]) == (pytest.approx(hits / n), n)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_means_have_the_normal_interval():
    found = mean(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert found["value"] == 3 and found["high"] - 3 == pytest.approx(1.96 * (14 / 3) ** 0.5 / 2)


def test_extents_ignore_stray_pixels_and_count_copies():
    once = paint((2, 0.25, 0.25, 0.5, 0.5), (2, 0.75, 0.75, 0.8, 0.8))
    twice = paint((2, 0.25, 0.25, 0.5, 0.5), (2, 0.75, 0.75, 0.95, 0.95))
    extents = drawn_extents(Oracle(), torch.stack([once, twice]), torch.tensor([[2, 5], [2, 5]]))
    assert extents[0, 0].tolist() == [0.25, 0.25, 0.5, 0.5]
    assert extents[1, 0].tolist() == pytest.approx([0.25, 0.25, 0.95, 0.95], abs=0.02)
    assert (extents[:, 1] == 0).all()


def test_layouts_of_box_control_are_held_out_and_possible():
    scenes = boxed_scenes(40)
    boxes = mask_boxes(draw(scenes)[1])
    for layout in boxed_layouts(scenes, boxes):
        places = layout.boxes
        check_instances(layout.prompt, places, [])
        assert len({words.split()[-1] for words in places}) == len(places) in (2, 3)
        assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in places.values())
    assert set(scenes.count.tolist()) == {2, 3}


@pytest.mark.parametrize(("moved", "expected"), [(0.0, 1.0), (0.5, 0.0)])
def test_box_control_sees_whether_things_are_in_their_boxes(moved, expected):
    def make(layouts):
        pictures = []
        for layout in layouts:
            things = []
            for words, (x0, y0, x1, y1) in layout.boxes.items():
                shift = moved * (x1 - x0) * (1 if x1 < 0.5 else -1)
                things.append((THINGS.index(words.split()[-1]), x0 + shift, y0, x1 + shift, y1))
            pictures.append(paint(*things))
        return torch.stack(pictures)

    measured, layouts, pictures = box_control(Oracle(), make, prompts=12, calibration=2)
    assert len(pictures) == 12
    assert measured["box control: all things in their boxes"]["value"] == expected
    assert measured["box control: IoU of extent and box"]["value"] == pytest.approx(
        1 if expected else 1 / 3, abs=0.1
    )
    others = box_control(Oracle(), make, prompts=12, calibration=2, seed=7)[1]
    assert not {layout.prompt for layout in others} & {layout.prompt for layout in layouts}


def test_the_report_holds_figures_against_their_targets():
    figure = {"value": 33.0, "low": 32.5, "high": 33.5, "n": 9}
    text = report(
        {"about": {"device": "here"}, "seconds": {"a": 1}, "measured": {"vae psnr": figure, "other": figure}}
    )
    assert "| vae psnr | 33.00 dB | 32.50 dB – 33.50 dB | 9 | 32.00 dB | yes |" in text
    assert "| other | 33.000 |" in text


def test_one_command_measures_and_records(tmp_path):
    given = [
        "parts=[reconstruction]",
        "reconstructions=3",
        "device=cpu",
        f"paths.output={tmp_path / 'record'}",
    ]
    folder = quality(settings_of(compose("quality", given)))
    assert "| vae psnr |" in (folder / "quality.md").read_text()
    assert (folder / "quality.json").is_file()


@pytest.mark.parametrize(
    ("given", "message"),
    [("parts=[taste]", "parts=taste is not known"), ("weights=nowhere", "holds no pipeline/")],
)
def test_what_cannot_be_measured_is_refused(given, message, tmp_path):
    with pytest.raises(MifoError, match=message):
        quality(settings_of(compose("quality", [given, f"paths.output={tmp_path}"])))


@pytest.mark.parametrize(("part", "judge"), [("text_to_image", "clip"), ("box_control", "segmenter")])
def test_weights_without_a_judge_are_refused_before_anything_is_measured(part, judge, tmp_path):
    weights = tmp_path / "weights"
    (weights / "pipeline").mkdir(parents=True)
    given = [f"parts=[reconstruction,{part}]", f"weights={weights}", f"paths.output={tmp_path / 'record'}"]
    with pytest.raises(MifoError, match=f"{part} needs {weights}/{judge}/; copy .*/{judge} there, or leave"):
        quality(settings_of(compose("quality", given)))
    assert not (tmp_path / "record").exists()
