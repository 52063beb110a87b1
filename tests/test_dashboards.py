"""Sweeps in dashboards: a server that speaks the protocol of Weights & Biases, and Trackio in a browser.

The servers are real and run on this machine. `openwandb` is in no extra, since its licence is non-commercial.
"""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import tiny_pipeline

pytestmark = pytest.mark.slow
STAGES = ("semantic", "finetuning")
KEY = "local0000000000000000000000000000000000000000"
ENTITY = "default"  # of the server's administrator
SHOTS = os.environ.get("MIFO_SCREENSHOTS")  # a folder in which the pictures of dashboards are kept

needs_server = pytest.mark.skipif(find_spec("openwandb") is None, reason="needs openwandb (pip install it)")
needs_browser = pytest.mark.skipif(
    find_spec("playwright") is None or not shutil.which("chromium"), reason="needs playwright and chromium"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """An openwandb on a port of this machine."""

    def __init__(self, folder, port):
        self.folder, self.port, self.url = folder, port, f"http://127.0.0.1:{port}"
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "openwandb", "serve", "--port", str(self.port)]
        with open(self.folder / "server.log", "a") as told:
            command += ["--host", "127.0.0.1", "--data-dir", str(self.folder)]
            own = {**os.environ, "OPENWANDB_ADMIN_PASS": KEY}
            self.process = subprocess.Popen(command, stdout=told, stderr=told, env=own)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(self.url, timeout=2)
                return
            except OSError:
                time.sleep(0.3)
        raise AssertionError((self.folder / "server.log").read_text())

    def stop(self):
        self.process.kill()
        self.process.wait()

    def runs(self):
        """Name → what the server's database holds of each run; wandb's `Api` asks it more than it knows."""
        with sqlite3.connect(self.folder / "openwandb.db") as database:
            listed = "SELECT run_id, display_name, state, config_json FROM runs"
            return {
                name: {
                    "id": own,
                    "state": state,
                    "config": {key: each.get("value") for key, each in json.loads(config).items()},
                    "curves": Counter(self._column(database, "metrics", "key", own)),
                    "artifacts": self._column(database, "artifacts", "name", own),
                    "files": self._column(database, "files", "name", own),
                }
                for own, name, state, config in database.execute(listed).fetchall()
            }

    @staticmethod
    def _column(database, table, column, run):
        return [row[0] for row in database.execute(f"SELECT {column} FROM {table} WHERE run_id = ?", [run])]

    def environment(self, **others):
        own = {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_SILENT": "true",
            "WANDB_MODE": "online",
        }
        return {**os.environ, **own, "COLUMNS": "200", **others}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("server"), free_port())
    running.start()
    yield running
    running.stop()


def mifo(folder, *arguments, environment=None, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "mifo", *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def quick(source, *extra):
    """A run on a tiny pipeline with random weights, or on the miniature where its pictures are wanted."""
    steps = (24, 8, 20) if SHOTS else (8, 4, 2)
    model = [] if SHOTS else ["model=local", f"model.source={source}", "metrics.windows=2"]
    learning = [f"learning.{stage}.steps={count}" for stage, count in zip(STAGES, steps, strict=False)]
    return [
        *("metrics=miniature", "device=cpu", "callbacks=none", "sheet=false", "learning.prior.weight=0"),
        *("synthesis.samples=1", f"synthesis.steps={steps[2]}", "guidance.guided_steps=1"),
        *("guidance.iterations=1", "trainer.log_every_n_steps=1", *model, *learning, *extra),
    ]


def sweep(source, *extra):
    return [
        "run",
        "-m",
        "penalty.reward_weight=0,10",
        "seed=1,2",
        "hydra.sweep.dir=sweep",
        *quick(source),
        *extra,
    ]


@pytest.fixture(scope="module")
def sent(source, server, tmp_path_factory):
    """The folder of a sweep of a loss's weight that was sent to the server."""
    folder = tmp_path_factory.mktemp("online")
    mifo(folder, *sweep(source, "logger=wandb"), environment=server.environment())
    return folder


@contextmanager
def browser():
    """A page of headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as browsers:
        chromium = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium.new_page(viewport={"width": 1280, "height": 800})


NAMES = [f"penalty.reward_weight={weight}, seed {seed}, three_cars" for weight in (0, 10) for seed in (1, 2)]


@needs_server
def test_a_sweep_online_is_read_back_from_the_server(sent, server):
    told = {name: run for name, run in server.runs().items() if run["config"]["sweep"] == str(sent / "sweep")}
    assert len(told) == 4 and all(any(name.startswith(each) for name in told) for each in NAMES)
    for run in told.values():
        config = run["config"]
        assert run["state"] == "finished" and config["code"]
        assert config["choices"]["penalty"] == "mifo"
        assert run["curves"]["semantic/loss/total"] == (24 if SHOTS else 8)
        assert run["curves"]["evaluation/leakage"] == 1
        assert any(each.startswith(f"three_cars-mifo-seed-{config['seed']}") for each in run["artifacts"])
        assert any("evaluation/samples" in each for each in run["files"])
        assert any("evaluation/pictures" in each and each.endswith(".table.json") for each in run["files"])


@needs_server
@needs_browser
def test_the_page_of_the_server_tells_the_runs_apart(sent, server, tmp_path):
    with browser() as page:
        page.request.post(f"{server.url}/api/v2/auth/login", data={"username": "admin", "password": KEY})
        page.goto(f"{server.url}/compare/{ENTITY}/mifo")
        for name in NAMES:
            page.get_by_text(name).first.wait_for(timeout=30_000)
        page.get_by_text("Select All").click()
        chart = page.locator(".chart-box", has_text="loss/attention").last  # of stage 1; 2 comes before it
        chart.wait_for(timeout=30_000)
        drawn = "box => echarts.getInstanceByDom(box.querySelector('.chart-container')).getOption().series"
        curves = {each["name"]: len(each["data"]) for each in chart.evaluate(drawn)}
        assert len(curves) == 4 and {*curves.values()} == {24 if SHOTS else 8}
        stays = ".container > div > div:has(> .panel) {position: sticky; top: 70px; align-self: flex-start}"
        page.add_style_tag(content=f"html, body {{overflow: visible}} {stays}")  # the list of names
        chart.evaluate("box => scrollTo(0, box.getBoundingClientRect().top + scrollY - 70)")
        page.wait_for_timeout(1500)  # a chart draws itself slowly
        page.screenshot(path=Path(SHOTS or tmp_path) / "server.png")


@needs_server
def test_an_offline_sweep_is_sent_by_wandb_sync(source, server, tmp_path):
    offline = server.environment(WANDB_MODE="offline")
    mifo(tmp_path, *sweep(source, "logger=wandb", "instances=alike_two_cups"), environment=offline)
    parts = [str(path) for path in tmp_path.glob("sweep/*/wandb/offline-run-*")]
    assert len(parts) == 4
    command = [sys.executable, "-m", "wandb", "sync", *parts]
    done = subprocess.run(command, env=server.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    new = [name for name, run in server.runs().items() if run["config"]["sweep"] == str(tmp_path / "sweep")]
    assert len(new) == 4 and all("alike_two_cups" in name for name in new)


def begun(source, server, folder, *extra):
    """A run that has begun to learn, under the eyes of the server; its process."""
    one = ["run", *quick(source, "logger=wandb", "seed=7", "hydra.run.dir=made"), *extra]
    started = subprocess.Popen(
        [sys.executable, "-m", "mifo", *one],
        cwd=folder,
        env=server.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 240
    while time.monotonic() < until and started.poll() is None:
        if any(run["curves"]["semantic/loss/total"] for run in server.runs().values()):
            return started
        time.sleep(0.2)
    raise AssertionError(started.communicate()[1])


@pytest.fixture
def another(tmp_path_factory):
    """A server of one's own."""
    running = Server(tmp_path_factory.mktemp("another"), free_port())
    running.start()
    yield running
    running.stop()


@needs_server
def test_an_interrupted_run_goes_on_as_the_same_run(source, another, tmp_path):
    often = ["learning.semantic.steps=200", "learning.semantic.checkpoint_every=1"]
    started = begun(source, another, tmp_path, *often)
    started.send_signal(signal.SIGTERM)
    assert started.wait(120) == 128 + signal.SIGTERM, started.stderr.read()
    (before,) = another.runs().values()
    mifo(tmp_path, "run", "resume=made", environment=another.environment())
    (after,) = another.runs().values()
    assert after["id"] == before["id"] and after["state"] == "finished"
    # the steps since the last checkpoint are there twice
    assert after["curves"]["semantic/loss/total"] in (200, 201, 202)
    assert after["curves"]["evaluation/leakage"] == 1


@needs_server
def test_a_server_that_goes_midway_costs_no_run(source, another, tmp_path):
    started = begun(source, another, tmp_path, "learning.semantic.steps=100")
    another.stop()
    time.sleep(3)
    another.start()
    assert started.wait(300) == 0, started.stderr.read()
    (run,) = another.runs().values()
    assert run["state"] == "finished" and run["curves"]["semantic/loss/total"] == 100


TABLE = """
title: Small
rows: {MIFO: [method=mifo], none: [method=no_attention_loss]}
scenes: {cars: [three_cars]}
seeds: [0]
columns: [leakage]
"""


@needs_server
def test_a_finished_table_is_sent_once(source, another, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "table.yaml").write_text(TABLE)
    asked = ["table", "small", *quick(source, "logger=csv")]
    mifo(tmp_path, *asked)
    assert "sent: 2 runs" in mifo(tmp_path, *asked, "table.send=true", environment=another.environment())
    told = another.runs()
    assert {name for name in told if "seed" in name} == {
        "MIFO, seed 0, three_cars",
        "none, seed 0, three_cars",
    }
    assert "Small" in told
    for run in told.values():
        assert run["state"] == "finished" and run["config"]["table"] == "small"
    assert told["none, seed 0, three_cars"]["config"]["set"] == "cars"
    assert told["MIFO, seed 0, three_cars"]["curves"]["semantic/loss/total"] > 0
    assert any(each.startswith("table-small") for each in told["Small"]["artifacts"])
    assert "sent: 0 runs" in mifo(tmp_path, *asked, "table.send=true", environment=another.environment())
    assert len(another.runs()) == 3


@needs_server
@pytest.mark.skipif(find_spec("wandb_workspaces") is None, reason="needs wandb-workspaces")
def test_a_server_without_workspaces_is_refused_in_a_sentence(server, tmp_path):
    command = [sys.executable, "-m", "mifo", "dashboard", f"entity={ENTITY}"]
    done = subprocess.run(
        command, cwd=tmp_path, env=server.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "did not take the dashboard" in done.stderr, done.stderr


@needs_browser
@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio")
def test_trackio_shows_a_sweep_in_a_browser(source, tmp_path):
    own = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "COLUMNS": "200"}
    mifo(tmp_path, *sweep(source, "logger=trackio"), environment=own)
    program = (
        "import trackio, time; "
        "url = trackio.show(project='mifo', open_browser=False, block_thread=False)[1]; "
        "print('URL', url, flush=True); time.sleep(300)"
    )
    shown = subprocess.Popen([sys.executable, "-c", program], env=own, stdout=subprocess.PIPE, text=True)
    try:
        url = next(line.split()[1] for line in shown.stdout if line.startswith("URL"))
        with browser() as page:
            page.goto(f"{url}?project=mifo")
            for name in NAMES:
                page.get_by_text(name).first.wait_for(timeout=30_000)
            # a list beside the curves shows the first 32 letters
            assert len({name[:32] for name in NAMES}) == len(NAMES)
            page.get_by_text("Media & Tables").first.click()
            page.get_by_text("evaluation/samples").first.wait_for(timeout=30_000)
            assert page.get_by_text("evaluation/samples").count() >= 4
            page.wait_for_function("!document.body.innerText.includes('Loading image')")
            page.screenshot(path=Path(SHOTS or tmp_path) / "trackio.png")
    finally:
        shown.kill()
