"""The pages of docs/, as files of the repository and as a site."""

import ast
import importlib.util
import re
import shlex
import socket
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from test_masks import segmenter  # noqa: F401

from mifo.config.compose import compose
from mifo.config.location import conf_folder

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("experiments/**/*.md"))]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s:]+)\)")


def without_code(text):
    return re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """What GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def definitions(body, above=""):
    """The dotted names of the classes and functions of a file."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield above + node.name
            yield from definitions(node.body, f"{above}{node.name}.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for label, target in LINK.findall(without_code(page.read_text())):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"
        if file.suffix == ".py" and label.startswith("`"):
            found = {*definitions(ast.parse(file.read_text()).body)}
            assert label.strip("`") in found, f"{page.name} names {label} of {path}"


def test_ticks_of_the_table_of_models_name_tests_that_exist():
    told = [
        line for line in (ROOT / "docs/usage.md").read_text().splitlines() if re.match(r"\d+\. `test_", line)
    ]
    for line in told:
        for part in line.split(";"):
            files, names = re.findall(r"`(test_\w+\.py)`", part), re.findall(r"`(test_\w+)`", part)
            for file in files:
                assert all(f"def {name}(" in (ROOT / "tests" / file).read_text() for name in names), part
    assert len(told) == 8


def test_the_page_of_formulas_names_every_file_of_losses_guidance_and_regions():
    text = (ROOT / "docs/method.md").read_text()
    for folder in ("losses", "guidance", "regions"):
        for file in (ROOT / "mifo/method" / folder).glob("*.py"):
            if file.name not in ("__init__.py", "settings.py", "attention_loss.py"):
                assert f"../mifo/method/{folder}/{file.name})" in text


@pytest.fixture(scope="module")
def configuration():
    """The page of keys and options, as its script makes it."""
    spec = importlib.util.spec_from_file_location("page", ROOT / "docs/hooks/configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.configuration()


def test_every_key_of_a_run_is_on_the_page_of_keys(configuration):
    config = OmegaConf.to_container(compose("run", ["paths.output=here"]))
    elsewhere = ("task", "origin", "trainer", "callbacks", "logger")  # MIFO's own, and what classes take

    def leaves(node, above=""):
        for key, value in node.items():
            name = re.sub(r"^(penalty\.terms)\.\w+", r"\1.NAME", above + key)
            if f"| `{name}` |" in configuration or not isinstance(value, dict):
                yield name
            else:
                yield from leaves(value, f"{name}.")

    found = {*leaves({key: value for key, value in config.items() if key not in elsewhere})}
    assert len(found) > 90
    assert [key for key in sorted(found) if f"| `{key}` |" not in configuration] == []
    assert "| `performance.threads` | `null` | of the processor; null: as many" in configuration


def test_every_option_is_on_the_page_of_keys(configuration):
    for file in conf_folder().glob("*/**/*.yaml"):
        group = file.parent.relative_to(conf_folder()).as_posix()
        (said,) = re.findall(rf"^\| `{group}={file.stem}` \| (.*) \|$", configuration, re.MULTILINE)
        assert said and "@package" not in said


def test_the_site_is_built_and_loads_nothing_from_the_network(tmp_path, monkeypatch):
    pytest.importorskip("material", reason="the site needs mkdocs-material (extra docs)")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    def refused(*_):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refused)
    site = tmp_path / "site"
    build(load_config(str(ROOT / "scripts/mkdocs.yml"), site_dir=str(site), strict=True))
    pages = {file.relative_to(site).as_posix(): file.read_text() for file in site.rglob("*.html")}
    assert {"index.html", "photo.html", "configuration.html", "experiments/index.html"} <= {*pages}
    loads = re.compile(r'<(?:script|img|iframe|link)[^>]*(?:src|href)="?(?:https?:)?//', re.IGNORECASE)
    assert [name for name, text in pages.items() if loads.search(text)] == []
    assert not [file for file in site.rglob("*.css") if re.search(r"url\(\W?http", file.read_text())]
    assert 'href="source/mifo/method/guidance/descent.py.html#penalty_weight"' in pages["method.html"]
    assert 'id="penalty_weight"' in pages["source/mifo/method/guidance/descent.py.html"]


@pytest.mark.slow
def test_a_stranger_types_the_first_photo_as_written(mifo, source, segmenter, tmp_path, monkeypatch):  # noqa: F811
    """With tiny models, a few steps and a picture in place of a photograph."""
    page = (ROOT / "docs/photo.md").read_text().partition("## Masks")[0]
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("mifo ")]
    assert [task for _, task, *_ in commands] == [
        "masks",
        "doctor",
        "run",
        "synthesize",
        "evaluate",
        "export",
    ]
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[12:58, 4:32], picture[26:58, 38:60] = (200, 120, 40), (40, 90, 200)
    Image.fromarray(picture).save(tmp_path / "photo.jpg")
    monkeypatch.setenv("WANDB_MODE", "offline")
    own = {
        "model=sd21": ["model=local", f"model.source={source}"],
        "metrics=sd21": ["metrics=miniature"],
    }
    short = {
        "masks": [f"segmenter={segmenter}"],
        "doctor": ["metrics=miniature"],
        "run": ["metrics=miniature", "debug=default"],
        "synthesize": ["synthesis.steps=4", "guidance.iterations=1"],
    }
    for _, task, *typed in commands:
        arguments = [given for each in typed for given in own.get(each, [each])]
        assert mifo(task, *arguments, *short.get(task, []), "device=cpu") == 0, task
    assert (tmp_path / "first/masks/masks.png").is_file()
    assert (tmp_path / "first/run/contact_sheet.html").is_file()
    assert len([*(tmp_path / "first/beach/pictures").glob("*.png")]) == 4
    assert (tmp_path / "first/export/exported/README.md").is_file()
