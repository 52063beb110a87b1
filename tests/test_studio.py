"""`mifo studio`: what it keeps, and a walk through its page in a browser without a window."""

import base64
import os
import shutil
import socket
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from tiny import tiny_segmenter

from mifo.data.instances import InstanceSet
from mifo.data.layouts import LayoutSettings
from mifo.errors import MifoError
from mifo.studio import jobs, kept
from mifo.studio.clicks import Clicks

ROOT = Path(__file__).parents[1]
TOKENS = ("<asset0>", "<asset1>")


def url(box: tuple[int, int, int, int]) -> str:
    """A mask of 64×64 pixels as the browser sends it."""
    mask, stream = Image.new("RGBA", (64, 64), "black"), BytesIO()
    ImageDraw.Draw(mask).rectangle(box, fill="white")
    mask.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


LEFT, RIGHT = url((4, 20, 26, 50)), url((36, 20, 60, 50))


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.linear_gradient("L").resize((128, 128)).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def test_a_missing_gradio_is_named(mifo, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert mifo("studio") == 2
    assert "pip install 'mifo[studio]'" in capsys.readouterr().err


def test_what_is_kept_serves_the_command_line(mifo, photo, tmp_path, capsys):
    folder = tmp_path / "studio"
    assert kept.keep_photo(folder, "two cars!", photo, ["red car", "car"], [LEFT, RIGHT]) == "two_cars"
    layout = LayoutSettings("<asset0> and <asset1> at sea", boxes={"<asset1>": [0.1, 0.25, 0.5, 0.75]})
    assert kept.keep_layout(folder, "row", layout, TOKENS) == "row_2"  # row is an option of MIFO's own
    assert mifo("layout", "instances=two_cars", "layout=row_2", "--config-dir", "studio") == 0
    assert "<asset0> and <asset1> at sea" in capsys.readouterr().out
    found = kept.kept_layout(folder, "row_2", TOKENS)
    assert found.boxes == {"<asset1>": (0.1, 0.25, 0.5, 0.75)}
    settings = kept.kept_instances(folder, "two_cars")
    assert settings.class_names == ["red car", "car"]
    assert (Path(settings.folder) / "img.jpg").read_bytes() == photo.read_bytes()


@pytest.mark.parametrize("name", ["20240101_120000", "1", "null", "True", "1e5"])
def test_a_photo_whose_name_hydra_reads_as_a_number_can_be_learned(mifo, photo, tmp_path, name):
    assert kept.keep_photo(tmp_path / "studio", name, photo, ["", ""], [LEFT, RIGHT]) == f"my_{name}"
    assert mifo("layout", f"instances=my_{name}", "--config-dir", "studio") == 0


def test_nothing_that_is_kept_is_overwritten(photo, tmp_path):
    def keep(names, masks):
        return kept.keep_photo(tmp_path, "a", photo, names, masks)

    assert [keep(["", ""], [LEFT, RIGHT]), keep(["", ""], [RIGHT, LEFT])] == ["a", "a_2"]
    assert [keep(["", ""], [LEFT, RIGHT]), keep(["x", "y"], [LEFT, RIGHT])] == ["a", "a_3"]
    assert sorted(kept.options(tmp_path, "instances")) == ["a", "a_2", "a_3"]


@pytest.mark.parametrize(
    "names, masks, told",
    [
        (["cat"], [None], "cat has no mask"),
        ([], [], "no instance"),
        (["cat", ""], [LEFT, RIGHT], "instance 2 has no name"),
        (["${oc.env:HOME}"], [LEFT], "is not kept"),
        (["cat"], ["data:image/png;base64,????"], "is damaged"),
        (["cat"], ["data:image/png;base64,aaaa"], "mask0.png"),
    ],
)
def test_what_cannot_be_learned_is_not_kept(photo, tmp_path, names, masks, told):
    with pytest.raises(MifoError, match=told.replace("$", r"\$")):
        kept.keep_photo(tmp_path / "studio", "a", photo, names, masks)
    assert kept.options(tmp_path / "studio", "instances") == []
    assert not [*tmp_path.glob("studio/photos/*")]


def test_a_click_becomes_a_mask_of_the_shown_picture(photo, tmp_path):
    source = str(tiny_segmenter(tmp_path / "sam2"))
    shown = kept.as_url(Image.open(photo))
    clicks = Clicks(source)
    url = clicks.mask(shown, [(0.3, 0.4, 1)])
    mask = Image.open(BytesIO(kept.content(url)))
    assert mask.size == (128, 128) and {*mask.getdata()} <= {0, 255} and mask.getextrema()[1] == 255
    assert clicks.mask(shown, [(0.3, 0.4, 1), (0.8, 0.8, 0)]) != url
    assert clicks.mask(shown, [(0.3, 0.4, 1)]) == url
    with pytest.raises(MifoError, match="segmenter=nowhere cannot be loaded"):
        Clicks("nowhere").mask(shown, [(0.3, 0.4, 1)])


def test_only_what_is_listed_is_opened(tmp_path):
    (tmp_path / "secret.yaml").write_text("folder: /\n")
    with pytest.raises(MifoError, match="choose one of the list"):
        kept.kept_instances(tmp_path / "studio", "../../secret")


def test_prompts_name_instances():
    labels = ["car 1", "car 2", "red car"]
    prompt = "a photo of Car 2 and red car and a car at sea"
    assert kept.with_tokens(prompt, labels) == "a photo of <asset1> and <asset2> and a car at sea"
    assert kept.with_labels("<asset0> by <asset2>", labels) == "car 1 by red car"
    eleven = [f"cup {number}" for number in range(1, 12)]
    assert kept.with_tokens("cup 11 and cup 1", eleven) == "<asset10> and <asset0>"


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("car", "cat", "car"), ["car 1", "cat", "car 2"]),
        (("Car", "car"), ["Car 1", "car 2"]),
        (("car", "car", "car 1"), ["car 2", "car 3", "car 1"]),
    ],
)
def test_each_instance_has_a_label_of_its_own(names, told):
    tokens = tuple(f"<asset{i}>" for i in range(len(names)))
    image, masks = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(len(names), 8, 8)
    found = InstanceSet("photo", image, masks, names, (None,) * len(names), tokens)
    assert kept.labels(found) == told
    assert kept.with_tokens(" and ".join(told), told) == " and ".join(tokens)


def test_curves_join_what_a_resumed_run_logged(tmp_path):
    head = "finetuning/loss/total,semantic/loss/total,step\n"
    for version, rows in enumerate([",2.0,0\n,1.0,9\n", ",0.5,9\n4.0,,0\n1.0,,9\n", "1.0,"]):
        file = tmp_path / "csv" / f"version_{version}" / "metrics.csv"
        file.parent.mkdir(parents=True)
        file.write_text(head + rows)  # the last one is being written
        os.utime(file, (version, version))
    drawn = jobs.curves(tmp_path)
    assert "45.0,85.0 450.0,141.2" in drawn and "495.0,10.0 900.0,122.5" in drawn and "step 20" in drawn
    assert jobs.curves(tmp_path / "nothing") == ""


def wait(condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.5)


@pytest.fixture
def server(tmp_path):
    """The address of a studio in an empty folder."""
    pytest.importorskip("gradio")
    pytest.importorskip("playwright")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tiny_segmenter(tmp_path / "sam2")
    with open(tmp_path / "out.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mifo", "studio", f"port={port}", "browser=false", "segmenter=sam2"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")},
            stdout=log,
            stderr=log,
        )
    wait(lambda: process.poll() is not None or "studio: http" in (tmp_path / "out.log").read_text())
    assert process.poll() is None, (tmp_path / "out.log").read_text()
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(60)


def masked_folder(parent: Path, form: str) -> Path:
    """A folder with a photo and the masks of two instances in a form that tools write."""
    folder = parent / f"{form}_folder"
    folder.mkdir()
    shutil.copy(parent / "cars.png", folder / "img.png")
    if form == "boxes.yaml":
        (folder / form).write_text("red car: [0.03, 0.15, 0.48, 0.43]\nblue car: [0.52, 0.2, 0.97, 0.5]\n")
    else:
        labels = Image.new("L", (512, 512))
        ImageDraw.Draw(labels).ellipse((15, 80, 245, 220), fill=1)
        ImageDraw.Draw(labels).ellipse((265, 100, 500, 250), fill=2)
        labels.save(folder / form)
    return folder


@pytest.mark.slow
def test_a_walk_through_the_page(server, tmp_path):
    """Open, click, load, paint, learn, stop, go on, drag, make a picture, keep, reopen; screenshots stay."""
    playwright = pytest.importorskip("playwright.sync_api")
    from mifo.data.instances import read_instances
    from mifo.data.saved_pictures import as_image
    from mifo.data.settings import InstancesSettings
    from mifo.files import read_yaml

    drawn = read_instances(InstancesSettings(**read_yaml(ROOT / "conf" / "instances" / "three_cars.yaml")))
    as_image(drawn.image).resize((512, 512)).save(tmp_path / "cars.png")
    outside, errors = [], []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: outside.append(request.url))

        def tab(name: str) -> None:
            page.get_by_role("tab", name=name).click()

        def drag(canvas: str, *points: tuple[float, float]) -> None:
            edge = page.locator(f"#{canvas} canvas").bounding_box()
            places = [(edge["x"] + x * edge["width"], edge["y"] + y * edge["height"]) for x, y in points]
            page.mouse.move(*places[0])
            page.mouse.down()
            for place in places[1:]:
                page.mouse.move(*place, steps=5)
            page.mouse.up()

        def shot(name: str) -> None:
            page.screenshot(path=tmp_path / f"{name}.png", full_page=True)

        def choose(label: str, option: str) -> None:
            page.get_by_label(label, exact=True).click()
            page.get_by_role("option", name=option).first.click()

        page.goto(server)
        page.get_by_role("button", name="Keep photo and masks").click()
        page.get_by_text("there is no photo yet").wait_for()
        for form in ("labels.png", "boxes.yaml"):
            page.get_by_label("or a folder of photo and masks").fill(str(masked_folder(tmp_path, form)))
            page.keyboard.press("Enter")
            page.get_by_text(f"Opened {form}_folder").wait_for()
            assert page.locator("#paint .chip").count() == 2
            shot(form)
        page.get_by_role("button", name="click", exact=True).click()
        drag("paint", (0.3, 0.3))
        wait(lambda: not page.locator("#paint .told").inner_text())
        page.get_by_role("button", name="click beside").click()
        drag("paint", (0.7, 0.7))
        wait(lambda: not page.locator("#paint .told").inner_text())
        shot("clicks")
        page.get_by_role("button", name="Keep photo and masks").click()
        page.get_by_text("Kept as boxes_yaml_folder").wait_for()
        page.get_by_text("is it white on its instance").wait_for()  # what the command line warns of
        clicked = read_instances(kept.kept_instances(tmp_path / "studio", "boxes_yaml_folder"))
        boxes = read_instances(InstancesSettings(folder=str(tmp_path / "boxes.yaml_folder")))
        assert torch.equal(clicked.masks[1], boxes.masks[1])  # what was not clicked stays
        assert not torch.equal(clicked.masks[0], boxes.masks[0])
        page.get_by_role("button", name="brush").click()
        page.set_input_files("#drop input[type=file]", tmp_path / "cars.png")
        wait(lambda: page.locator("#paint .chip").count() == 1)
        page.locator("#paint .chip input").fill("car")
        drag("paint", (0.1, 0.35), (0.4, 0.32), (0.4, 0.25), (0.15, 0.3))
        page.locator("#paint .more").click()
        page.locator("#paint .chip input").nth(1).fill("car")
        page.get_by_role("button", name="outline").click()
        drag("paint", (0.53, 0.3), (0.66, 0.2), (0.83, 0.21), (0.97, 0.31), (0.9, 0.48), (0.54, 0.42))
        page.get_by_role("button", name="Keep photo and masks").click()
        page.get_by_text("Kept as cars").wait_for()
        shot("photo")
        place = tmp_path / "studio" / "photos" / "cars"
        masks = read_instances(InstancesSettings(folder=str(place))).masks
        assert masks.shape == (2, 512, 512) and 0.015 < masks[0].mean() < 0.05 < masks[1].mean() < 0.12
        assert masks[1, 180, 400] == 1 and masks[1, 180, 100] == 0  # where the outline was drawn

        tab("2 · Learn")
        choose("photo", "cars")
        page.get_by_label("steps, words").fill("12")
        page.get_by_label("steps, weights").fill("0")
        page.get_by_label("steps between sample pictures").fill("0")
        page.get_by_role("button", name="Learn", exact=True).click()
        wait(lambda: [*tmp_path.glob("outputs/learn/*/csv/*/metrics.csv")])
        page.get_by_role("button", name="Stop").click()
        state = page.locator("#state")
        wait(lambda: "interrupted" in state.inner_text())
        page.get_by_role("button", name="Go on").click()
        wait(lambda: "ok" in state.inner_text() and page.locator(".curves polyline").count())
        shot("learning")

        tab("3 · Pictures")
        choose("what was learned", "cars")
        page.locator("#boxes .chip").nth(1).wait_for()
        drag("boxes", (0.25, 0.55), (0.3, 0.3))
        page.get_by_label("prompt, with the names of the instances").fill("car 1 and car 2 in the snow")
        page.get_by_label("pictures", exact=True).fill("1")
        page.get_by_label("sampling steps").fill("4")
        page.get_by_role("button", name="Make pictures").click()
        wait(lambda: "ok" in page.locator("#made-note").inner_text())
        page.locator("#made img").first.wait_for()
        prompt = page.get_by_label("prompt, with the names of the instances").input_value()
        assert prompt == "car 1 and car 2 in the snow"  # what was made is what is shown
        shot("pictures")
        layout = kept.kept_layout(tmp_path / "studio", "cars", TOKENS)
        assert layout.prompt == "<asset0> and <asset1> in the snow"
        assert layout.boxes["<asset0>"][1] < 0.2 < layout.boxes["<asset1>"][1]

        tab("4 · Runs")
        page.get_by_role("gridcell", name="learn", exact=True).click()
        page.locator("#shown img").first.wait_for()
        shot("runs")

        page.reload()  # what was kept is there again, to the bit
        page.locator("#paint canvas").wait_for()
        choose("or what was kept", "cars")
        page.locator("#paint .chip input").nth(1).wait_for()
        page.get_by_text("Opened cars").wait_for()
        page.get_by_role("button", name="Keep photo and masks").click()
        page.get_by_text("Kept as cars.").wait_for()
        tab("3 · Pictures")
        choose("what was learned", "cars")
        page.locator("#boxes .chip").nth(1).wait_for()
        choose("layout that was kept", "cars")
        wait(lambda: "snow" in page.get_by_label("prompt, with the names of the instances").input_value())
        page.get_by_role("button", name="Keep layout").click()
        page.get_by_text("Kept as cars:").wait_for()
        browser.close()
    assert not errors
    assert all(each.startswith((server, "data:", "blob:")) for each in outside)
    assert kept.options(tmp_path / "studio", "layout") == ["cars"]
    assert sorted(kept.options(tmp_path / "studio", "instances")) == ["boxes_yaml_folder", "cars"]
