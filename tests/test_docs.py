"""The pages of docs/, as files of the repository and as a site."""

import ast
import importlib.util
import re
import socket
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mifo.config import compose, conf_folder

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
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site), strict=True))
    pages = {file.relative_to(site).as_posix(): file.read_text() for file in site.rglob("*.html")}
    assert {"index.html", "photo.html", "configuration.html", "experiments/index.html"} <= {*pages}
    loads = re.compile(r'<(?:script|img|iframe|link)[^>]*(?:src|href)="?(?:https?:)?//', re.IGNORECASE)
    assert [name for name, text in pages.items() if loads.search(text)] == []
    assert not [file for file in site.rglob("*.css") if re.search(r"url\(\W?http", file.read_text())]
    assert 'href="source/mifo/method/guidance/descent.py.html#penalty_weight"' in pages["method.html"]
    assert 'id="penalty_weight"' in pages["source/mifo/method/guidance/descent.py.html"]
