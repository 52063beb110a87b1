"""Sweeps in dashboards: a server that speaks the protocol of Weights & Biases, and Trackio in a browser.

The servers are real and run on this machine. `openwandb` is in no extra, since its licence is non-commercial.
"""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import tiny_pipeline

pytestmark = pytest.mark.slow
KEY = "local0000000000000000000000000000000000000000"
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
            command += ["--data-dir", str(self.folder)]
            self.process = subprocess.Popen(command, stdout=told, stderr=told)
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


def sweep(source, *extra):
    return [
        *(
            "run",
            "-m",
            "penalty=mifo,none",
            "seed=1,2",
            "model=local",
            f"model.source={source}",
            "device=cpu",
        ),
        *(
            "metrics=miniature",
            "metrics.windows=2",
            "callbacks=none",
            "sheet=false",
            "learning.prior.weight=0",
        ),
        *("learning.semantic.steps=8", "learning.finetuning.steps=4", "trainer.log_every_n_steps=1"),
        *("synthesis.steps=2", "synthesis.samples=1", "guidance.guided_steps=1", "guidance.iterations=1"),
        *("hydra.sweep.dir=sweep", *extra),
    ]


@needs_server
def test_a_sweep_online_is_read_back_from_the_server(source, server, tmp_path):
    mifo(tmp_path, *sweep(source, "logger=wandb"), environment=server.environment())
    told = server.runs()
    assert len(told) == 4
    for name, run in told.items():
        config = run["config"]
        assert name.endswith(f"seed {config['seed']}") and run["state"] == "finished"
        assert name.startswith(f"penalty={config['choices']['penalty']}, ")
        assert config["sweep"] == str(tmp_path / "sweep") and len(config["code"]) == 40
        assert run["curves"]["semantic/loss/total"] == 8 and run["curves"]["evaluation/leakage"] == 1
        assert any(each.startswith(f"three_cars-mifo-seed-{config['seed']}") for each in run["artifacts"])
        assert any("evaluation/samples" in each for each in run["files"])
        assert any("evaluation/pictures" in each and each.endswith(".table.json") for each in run["files"])


@needs_server
def test_an_offline_sweep_is_sent_by_wandb_sync(source, server, tmp_path):
    before = {run["id"] for run in server.runs().values()}
    offline = server.environment(WANDB_MODE="offline")
    mifo(tmp_path, *sweep(source, "logger=wandb", "instances=alike_two_cups"), environment=offline)
    parts = [str(path) for path in tmp_path.glob("sweep/*/wandb/offline-run-*")]
    assert len(parts) == 4
    command = [sys.executable, "-m", "wandb", "sync", *parts]
    done = subprocess.run(command, env=server.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    new = {name: run for name, run in server.runs().items() if run["id"] not in before}
    assert len(new) == 4 and all("alike_two_cups" in name for name in new)


@needs_server
def test_a_server_that_goes_midway_costs_no_run(source, tmp_path_factory, tmp_path):
    server = Server(tmp_path_factory.mktemp("lost"), free_port())
    server.start()
    one = [each for each in sweep(source, "logger=wandb") if each not in ("-m", "hydra.sweep.dir=sweep")]
    one = [each.replace("mifo,none", "none").replace("1,2", "1") for each in one]
    command = [
        sys.executable,
        "-m",
        "mifo",
        *map(str, one),
        "hydra.run.dir=made",
        "learning.semantic.steps=40",
    ]
    started = subprocess.Popen(command, cwd=tmp_path, env=server.environment(), stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not (tmp_path / "made" / "wandb_id.txt").is_file() and time.monotonic() < until:
        time.sleep(0.1)
    server.stop()
    time.sleep(3)
    server.start()
    try:
        assert started.wait(240) == 0, started.stderr.read()
        (run,) = server.runs().values()
        assert run["state"] == "finished"
        assert run["curves"]["semantic/loss/total"] == 40
    finally:
        server.stop()


@needs_browser
@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio")
def test_trackio_shows_a_sweep_in_a_browser(source, tmp_path):
    from playwright.sync_api import sync_playwright

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
        with sync_playwright() as browsers:
            page = browsers.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            ).new_page(viewport={"width": 1280, "height": 800})
            page.goto(f"{url}?project=mifo")
            page.get_by_text("semantic", exact=False).first.wait_for(timeout=30_000)
            text = page.inner_text("body")
            for penalty in ("none", "mifo"):
                assert f"penalty={penalty}, " in text and "three_cars, seed 2" in text
            folder = Path(SHOTS or tmp_path)
            page.screenshot(path=folder / "trackio_curves.png")
            page.get_by_text("Media & Tables").first.click()
            page.get_by_text("evaluation/samples").first.wait_for(timeout=30_000)
            assert page.get_by_text("evaluation/samples").count() >= 4
            page.screenshot(path=folder / "trackio.png")
    finally:
        shown.kill()
