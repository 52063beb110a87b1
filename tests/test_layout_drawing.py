"""Drawn layouts: boxes where they belong, in their instance's colour, with words that can be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from mifo.report.drawing import draw_layout, font_for
from mifo.report.layout_page import GAP, PADDING, SIDE, SIDE_ALONE, SIZE, caption, draw_layouts
from mifo.report.masked_picture import draw_masks
from mifo.report.palette import INK, PALETTE, PAPER, contrast, instance_colour, name_colours, text_colour


def near(image, colour, tolerance=3):
    return (np.abs(np.asarray(image).astype(int) - np.array(colour)) <= tolerance).all(axis=-1)


@pytest.mark.parametrize("picture", [None, Image.new("RGB", (64, 64))])
def test_a_box_is_outlined_at_its_edges(picture):
    image = draw_layout({"<asset1>": (0.25, 0.5, 0.75, 1.0)}, picture, size=400)
    assert image.size == (400, 400)
    rows, columns = np.where(near(image, instance_colour(1)))
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (100, 299, 200, 399)


def test_a_picture_keeps_its_proportions_and_its_pixels_inside():
    picture = Image.new("RGB", (40, 20), (128, 128, 128))
    image = draw_layout({"<asset0>": (0.1, 0.1, 0.9, 0.9)}, picture, size=400)
    assert image.size == (400, 200)
    assert image.getpixel((200, 120)) == (128, 128, 128)


def test_labels_do_not_hide_each_other_and_stay_in_the_picture():
    boxes = {f"<asset{i}>": (0.4, 0.4, 0.95, 0.95) for i in range(3)}
    image = draw_layout(boxes, None, size=400)
    areas = [near(image, instance_colour(index)).sum() for index in range(3)]
    assert min(areas) > 700  # each label's ground is to be seen
    edge = draw_layout({"a long name of a thing": (0.9, 0.0, 1.0, 0.05)}, None, size=400)
    alone = near(edge, name_colours(["a long name of a thing"])["a long name of a thing"])
    assert alone.sum() > 1500


def test_an_instance_has_one_colour_whatever_stands_beside_it():
    assert name_colours(["<asset2>"])["<asset2>"] == instance_colour(2)
    colours = name_colours(["a mug", "<asset2>", "tree", "<asset7>"])
    assert colours["<asset2>"] == PALETTE[2] and len(set(colours.values())) == 4
    assert len(name_colours([str(index) for index in range(20)])) == 20


def test_every_label_can_be_read():
    assert contrast(INK, PAPER) > 15
    for colour in PALETTE:
        assert contrast(text_colour(colour), colour) >= 4.5  # WCAG 2.2, level AA


def test_masks_are_tinted_by_their_instance():
    masks = torch.zeros(2, 4, 4)
    masks[0, :, :2] = 1
    masks[1, :, 2:] = 1
    masks[:, 0] = 0
    image = np.asarray(draw_masks(Image.new("RGB", (64, 64), (204, 204, 204)), masks)).astype(int)
    blue, orange, background = image[40, 8], image[40, 56], image[4, 4]
    assert blue[2] - blue[0] > 80 and orange[0] - orange[2] > 80
    assert np.ptp(background) == 0


def test_layouts_stand_side_by_side_and_none_is_cut():
    boxes = [{"<asset0>": (0.1, 0.1, 0.5, 0.5)}, {"<asset1>": (0.2, 0.2, 0.8, 0.8)}, {}]
    prompts = ["a photo of " + "very " * 40 + "old <asset0>", "<asset1>" + "x" * 300, "a photo"]
    page = draw_layouts([(each, [prompt]) for each, prompt in zip(boxes, prompts, strict=True)])
    assert page.width == 2 * SIDE + GAP
    pitch = (page.height + GAP) // 2
    for index, each in enumerate(boxes):
        row, column = divmod(index, 2)
        x, y = column * (SIDE + GAP), row * pitch
        drawn = page.crop((x, y, x + SIDE, y + SIDE))
        assert drawn.tobytes() == draw_layout(each, None, SIDE).tobytes()
        below = np.asarray(page.crop((x, y + SIDE, x + SIDE, y + pitch - GAP)))
        rows, columns = np.where(below.max(axis=-1) < 128)
        assert rows.size and rows.max() < len(below) - PADDING // 2
        assert columns.min() >= PADDING - 2 and columns.max() < SIDE - PADDING + 2
    # every letter is there
    for prompt in prompts:
        lines = caption([prompt], SIDE - 2 * PADDING)
        assert "".join(lines).replace(" ", "") == prompt.replace(" ", "")
        assert max(font_for(line, SIZE).getlength(line) for line in lines) <= SIDE - 2 * PADDING
    assert caption(["a photo of <asset0>"] * 10, 180) == ["a photo of <asset0>", "(+9 more)"]


@pytest.mark.parametrize("picture", [None, Image.new("RGB", (64, 32), "navy")])
def test_one_layout_alone_is_drawn_large_over_its_prompt(picture):
    boxes = {"<asset0>": (0.1, 0.1, 0.5, 0.5)}
    alone = draw_layout(boxes, picture)
    page, more = (draw_layouts([(boxes, ["a photo"] * number)], picture) for number in (1, 3))
    assert page.width == alone.width == SIDE_ALONE and page.height > alone.height
    for each in (page, more):
        assert each.crop((0, 0, *alone.size)).tobytes() == alone.tobytes()
    assert page.tobytes() != more.tobytes()  # which says (+2 more)


def test_layout_draws_layouts_of_the_same_boxes_once(mifo, tmp_path, monkeypatch):
    seen = []

    def draw(layouts, picture):
        seen.extend(layouts)
        return draw_layouts(layouts, picture)

    monkeypatch.setattr("mifo.commands.layout.draw_layouts", draw)
    assert mifo("layout", "layout=power_set", "hydra.run.dir=here") == 0
    assert [len(boxes) for boxes, _ in seen] == [1, 1, 1, 2, 2, 2, 3]
    assert all(len(prompts) == 10 for _, prompts in seen)
    assert Image.open(tmp_path / "here" / "layout.png").width == 3 * (SIDE + GAP) - GAP


def test_layout_warns_of_boxes_that_most_models_cannot_sample(mifo, capsys):
    boxes = "layout.boxes={asset0: [0.2, 0.3, 0.21, 0.9], asset1: [0.5, 0.5, 0.6, 0.6]}"
    assert mifo("layout", boxes, "layout.endings=[a,b]") == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "too small" in line]
    assert "<asset0>, [0.2, 0.3, 0.21, 0.9], is too small" in told and "1/16" in told
    assert mifo("layout", "layout=power_set") == 0
    assert "too small" not in capsys.readouterr().out
