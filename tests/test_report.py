"""The contact sheet: everything is on it, and nothing that a user wrote can break it."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from mifo.data.saved_pictures import Picture
from mifo.errors import MifoError
from mifo.metrics.evaluation import Evaluation
from mifo.metrics.scores import Evaluator, Score
from mifo.report.html import sheet_html
from mifo.report.png import wrap
from mifo.report.sheet import Sheet, write_sheet

TOKENS = ("<asset0>", "<asset1>")


def make_sheet(count=2, evaluation=True, title="Two cars", names=("car", None)):
    masks = torch.zeros(2, 24, 32)
    masks[0, 4:20, 2:14] = 1
    masks[1, 4:20, 18:30] = 1
    boxes = {"<asset0>": (0.1, 0.4, 0.45, 0.9), "<asset1>": (0.55, 0.4, 0.9, 0.9)}
    pictures = [
        Picture(torch.rand(3, 32, 32), f"a photo of <asset0> and <asset1> number {index}", boxes, index)
        for index in range(count)
    ]
    measured = None
    if evaluation:
        scores = (Score("leakage", 0.125, False, Evaluator("vit", "abc"), "miniature", count),)
        measured = Evaluation(scores, tuple({"leakage": 0.1 + index / 1000} for index in range(count)))
    source = torch.randint(256, (3, 24, 32), dtype=torch.uint8)
    return Sheet(title, source, masks, TOKENS, names, pictures, measured, {"model": "miniature"})


class Page(HTMLParser):
    """Collects the images, the tags and the text of a page."""

    def __init__(self, html):
        super().__init__()
        self.images, self.tags, self.words = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_holds_everything_and_needs_nothing():
    html = sheet_html(make_sheet())
    page = Page(html)
    assert len(page.images) == 4 and all(image["alt"] for image in page.images)
    for image in page.images:
        kind, data = image["src"].split(",")
        assert (
            kind == "data:image/webp;base64" and Image.open(io.BytesIO(base64.b64decode(data))).width >= 768
        )
    assert not re.search(r"https?://|@import|<script|<link", html)
    text = "".join(page.words)
    for words in ("Two cars", "miniature", "Leakage", "0.125", "0.101", "vit@abc", "seed 1", "number 1"):
        assert words in text
    assert html.count('class="box') == 4 and "left:55.0%;top:40.0%;width:35.0%;height:50.0%" in html


def test_what_a_user_wrote_is_text():
    html = sheet_html(make_sheet(title="<script>alert(1)</script>", names=("<b>car</b>", None)))
    assert "script" not in Page(html).tags and "b" not in Page(html).tags


@pytest.mark.parametrize("count", [1, 3, 4])
def test_both_forms_are_written_once(tmp_path, count):
    png, html = write_sheet(tmp_path / "run", make_sheet(count))
    with Image.open(png) as image:
        assert image.width == 2400
        top = image.crop((0, 0, 2400, 200)).convert("L")
        bottom = image.crop((0, image.height - 20, 2400, image.height)).convert("L")
        assert top.getextrema()[0] < 100 and bottom.getextrema() == (255, 255)
    assert html.read_text().startswith("<!doctype html>")
    with pytest.raises(MifoError, match="already exists"):
        write_sheet(tmp_path / "run", make_sheet(count))


def test_a_picture_has_room_for_all_scores(tmp_path):
    many = {f"score {number}": 0.5 for number in range(40)}
    plain = make_sheet()
    sheet = replace(plain, evaluation=Evaluation(plain.scores, (many, many)))
    with Image.open(write_sheet(tmp_path, sheet)[0]) as image:
        below = image.crop((0, image.height - 40, 2400, image.height)).convert("L")
        scores = image.crop((0, image.height - 400, 2400, image.height - 120)).convert("L")
    assert below.getextrema() == (255, 255) and scores.getextrema()[0] < 150


def test_a_sheet_without_scores_is_a_sheet(tmp_path):
    _, html = write_sheet(tmp_path, make_sheet(evaluation=False))
    assert "Scores" not in html.read_text() and "Measured by" not in html.read_text()


def test_lines_break_between_words_and_lose_none():
    text = "a photo of <asset0> and <asset1> with a mountain in the background"
    lines = wrap(text, 14, 150)
    assert len(lines) > 2 and " ".join(word for line in lines for word in line) == text
    assert wrap("unbreakable" * 9, 14, 50) == [["unbreakable" * 9]]
