"""A run that goes on: from any path, out of a folder that may be a stranger's, and never two at once."""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from mifo.config.compose import as_plain, compose, settings_of
from mifo.config.jobs import read_status, write_status
from mifo.config.resume import folder_to_resume


def status(folder):
    return json.loads((folder / "status.json").read_text())["status"]


@pytest.fixture
def drawn(mifo, tmp_path):
    """The folder of a finished run of `mifo layout`."""
    assert mifo("layout", "hydra.run.dir=drawn", "seed=3") == 0
    return tmp_path / "drawn"


@cache
def composed(*overrides):
    return as_plain(settings_of(compose("learn", ["paths.output=PLACE", *overrides])))


@pytest.fixture
def begun(tmp_path):
    """Makes a folder as a run of `mifo learn` leaves it that was stopped while it learned."""

    def make(*overrides, **changes):
        folder = tmp_path / "begun"
        folder.mkdir(exist_ok=True)
        config = json.loads(json.dumps(composed(*overrides)).replace("PLACE", str(folder)))
        for key, value in changes.items():
            OmegaConf.update(made := OmegaConf.create(config), key.replace("__", "."), value, force_add=True)
            config = OmegaConf.to_container(made)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
        return folder

    return make


@pytest.fixture
def learned(monkeypatch):
    """The settings of each run of `mifo learn` that was let through; nothing is learned."""
    seen = []
    monkeypatch.setattr("mifo.commands.learn.learn", seen.append)
    return seen


@pytest.mark.parametrize(
    "name", ["seed=1", "a,b", "it's", "[a (1)", "Jürgen 日本", 'say "x"', "b\\s", "{a: 1}"]
)
def test_the_folder_of_a_run_may_have_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    quoted = [name.replace(mark, f"\\{mark}") for mark in "'\""]
    escaped = "".join(f"\\{letter}" if letter in "=,()[]{}: " else letter for letter in name)
    for text in (name, f"'{quoted[0]}'", f'"{quoted[1]}"', escaped, str(tmp_path / name)):
        assert folder_to_resume(["seed=1", f"resume={text}", "-x"]) == (tmp_path / name, ["seed=1", "-x"])
    assert folder_to_resume(["seed=1", "resume=null"]) == (None, ["seed=1"])


def test_a_run_goes_on_where_it_was_moved_to(mifo, drawn):
    moved = drawn.rename(drawn.parent / "it's, seed=1 (ü)")
    (moved / "layout.png").unlink()
    assert mifo("layout", f"resume={moved.name}") == 0
    assert (moved / "layout.png").is_file() and not drawn.exists()
    assert status(moved) == "ok" and read_status(moved)["overrides"] == ["seed=3"]


def test_the_command_that_is_printed_works_when_pasted(mifo, tmp_path, monkeypatch, capsys):
    def stop(*_):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr("mifo.commands.layout.draw_layouts", stop)
        assert mifo("layout", """hydra.run.dir='it\\'s, seed=1 (ü)'""") == 143
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (command,) = [line.split("go on with: ")[1] for line in told.splitlines() if "go on with" in line]
    assert status(tmp_path / "it's, seed=1 (ü)") == "interrupted"
    assert mifo(*shlex.split(command)[1:]) == 0
    assert status(tmp_path / "it's, seed=1 (ü)") == "ok"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_before_anything_was_done_asks_for_the_same_command(
    mifo, tmp_path, monkeypatch, capsys, number, code
):
    monkeypatch.setattr("mifo.config.checks.check", lambda *_: signal.raise_signal(number))
    # tests that were started in the background of a shell ignore signals, and so would the command
    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        assert mifo("layout", "hydra.run.dir=here", "seed=2") == code
    finally:
        signal.signal(number, before)
    assert status(tmp_path / "here") == "interrupted"
    assert "go on with: mifo layout hydra.run.dir=here seed=2" in capsys.readouterr().err


def test_an_interrupted_sweep_goes_on_in_its_folder(mifo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mifo.commands.layout.layout", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert mifo("layout", "-m", "seed=1,2", "hydra.sweep.dir=a b") == 143
    assert f'hydra.sweep.dir="{tmp_path / "a b"}"' in capsys.readouterr().err
    assert status(tmp_path / "a b" / "0") == "interrupted" and not (tmp_path / "a b" / "1").exists()


TARGETS = {
    "callbacks__bad": {"_target_": "os.system", "command": "touch owned"},
    "callbacks__announce__make": {"_target_": "torch.load", "f": "evil.pt", "weights_only": False},
    "callbacks__announce__list": [{"_target_": "numpy.load", "file": "evil.npy", "allow_pickle": True}],
    "logger__csv__name": {"_target_": "mifo.files.shutil.rmtree", "path": "."},
    "trainer__plugins": [{"_target_": "lightning.fabric.utilities.cloud_io._load"}],
    "logger__csv___target_": "evil.Logger",
}
PLACES = {
    "logger__csv__save_dir": "/tmp/elsewhere",
    "logger__csv__name": "../../elsewhere",
    "logger__csv__sub": "~/elsewhere",
    "callbacks__saver": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "elsewhere"},
    "learning__prior__cache": "/tmp/elsewhere",
    "logger__csv__settings": {"base_url": "http://elsewhere"},
}


@pytest.mark.parametrize("changes", [{key: value} for key, value in (TARGETS | PLACES).items()], ids=str)
def test_a_folder_chooses_neither_code_nor_places(
    mifo, begun, learned, tmp_path, monkeypatch, capsys, changes
):
    (tmp_path / "evil.py").write_text("open('owned', 'w')\nclass Logger: pass\n")
    folder = begun(**changes)
    assert mifo("learn", f"resume={folder}") == 2
    told = capsys.readouterr().err.strip()
    assert len(told.splitlines()) == 1 and "which a folder may not choose" in told
    assert not learned and not (tmp_path / "owned").exists()


def test_what_was_typed_for_the_run_is_not_run_again(mifo, begun, learned, tmp_path):
    folder = begun()
    (folder / "conf").mkdir()
    typed = [
        f"hydra.searchpath=[file://{folder}/conf]",
        "+callbacks.x._target_=os.system",
        "paths.output=/tmp/x",
    ]
    record = {"overrides": typed, "folder": str(tmp_path / "gone"), "files": None}
    (folder / "command.json").write_text(json.dumps(record))
    assert mifo("learn", f"resume={folder}") == 0
    (settings,) = learned
    assert settings.paths.output == str(folder) and set(settings.callbacks) == {
        "announce",
        "progress",
        "statistics",
        "tokens",
    }


def test_a_configuration_with_keys_of_hydra_is_refused(mifo, begun, capsys):
    folder = begun(hydra={"searchpath": ["file:///tmp"]})
    assert mifo("learn", f"resume={folder}") == 2
    assert "hydra is no key of mifo learn" in capsys.readouterr().err


def test_links_out_of_a_folder_and_pipes_are_refused(mifo, drawn, capsys):
    (drawn / "csv").symlink_to(drawn.parent)
    assert mifo("layout", "resume=drawn") == 2
    assert "drawn/csv is a link out of the run's folder" in capsys.readouterr().err
    (drawn / "csv").unlink()
    os.mkfifo(drawn / "layout.log.2")
    assert mifo("layout", "resume=drawn") == 2
    assert "neither a file nor a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no configuration of a run"),
        (b"a: [1", "not YAML"),
        (b"task: learn\n", "drawn holds a run of mifo learn"),
        (b"task: layout\nseed: ${oc.env:HOME}\n", "${…}"),
        (b'task: layout\ngroup: "\\x24{oc.env:HOME}"\n', "${…}"),
        (b"task: layout\nseed: x\n", "seed: Value 'x'"),
        (b"\xff\xfe", "config.yaml cannot be read"),
    ],
)
def test_a_damaged_configuration_is_told_in_a_sentence(mifo, drawn, capsys, content, words):
    (drawn / "config.yaml").write_bytes(content)
    assert mifo("layout", "resume=drawn") == 2
    told = capsys.readouterr().err.strip()
    assert words in told and len(told.splitlines()) == 1


def test_a_folder_that_was_moved_keeps_its_logs_with_it(mifo, begun, learned, tmp_path):
    moved = begun().rename(tmp_path / "moved")
    assert mifo("learn", f"resume={moved}") == 0
    assert learned[0].logger["csv"]["save_dir"] == str(moved)
    assert not (tmp_path / "begun").exists()


def test_what_is_typed_now_changes_the_hardware_and_nothing_else(mifo, begun, learned, capsys):
    folder = begun("seed=5", "callbacks=none", "logger=[csv,wandb]")
    given = ["device=cpu", "performance=reference", "+callbacks.x._target_=mifo.callbacks.announce.Announce"]
    assert mifo("learn", f"resume={folder}", *given, "tags=[new]", "logger.csv.name=other") == 0
    (settings,) = learned
    assert settings.seed == 5 and settings.resume == str(folder)
    assert settings.device == settings.trainer["accelerator"] == "cpu"
    assert settings.performance.name == "reference" and list(settings.callbacks) == ["x"]
    assert settings.logger["wandb"]["tags"] == ["new"] and settings.logger["csv"]["name"] == "other"
    assert mifo("learn", f"resume={folder}", "logger=none", "trainer=cpu", "~callbacks") == 0
    assert learned[1].logger == {} and learned[1].trainer["accelerator"] == "cpu"
    for other in ("seed=6", "learning.semantic.steps=3", "model=sd21", "paths.output=x", "hydra.run.dir=x"):
        assert mifo("learn", f"resume={folder}", other) == 2
        assert f"{other} cannot change a run that goes on" in capsys.readouterr().err


def test_code_that_is_named_anew_is_trusted(mifo, begun, learned, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("from lightning import Callback\nclass Mine(Callback): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = begun(callbacks__mine={"_target_": "mine.Mine"})
    assert mifo("learn", f"resume={folder}", "++callbacks.mine._target_=mine.Mine") == 0
    assert learned[0].callbacks["mine"] == {"_target_": "mine.Mine"}
    assert mifo("learn", f"resume={folder}", "~callbacks.mine") == 0


def test_relative_paths_mean_what_they_did(mifo, drawn, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert mifo("layout", "resume=../drawn") == 0
    assert Path.cwd() == tmp_path


def test_a_configuration_of_another_folder_needs_no_second_mention(mifo, tmp_path, capsys):
    (tmp_path / "conf" / "layout").mkdir(parents=True)
    (tmp_path / "conf" / "layout" / "mine.yaml").write_text("\ufeff# Mine\nprompt: a photo of {instances}\n")
    assert mifo("layout", "layout=mine", "--config-dir", "conf", "hydra.run.dir=here") == 0
    shutil.rmtree(tmp_path / "conf")
    assert mifo("layout", "resume=here") == 0


def test_a_folder_in_use_is_refused_and_its_status_stays(mifo, drawn, capsys):
    before = {path: path.read_bytes() for path in drawn.rglob("*") if path.is_file()}
    with open(drawn / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for command in (["resume=drawn"], ["hydra.run.dir=drawn", "seed=3"]):
            assert mifo("layout", *command) == 2
            assert "drawn is in use by another process" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in drawn.rglob("*") if path.is_file()}
    assert mifo("layout", "resume=drawn") == 0


def test_a_killed_run_is_told_from_one_that_runs(tmp_path):
    write_status(tmp_path, "running", [])
    assert read_status(tmp_path)["status"] == "running"
    (tmp_path / ".lock").touch()  # which nobody holds: another process has the number of the one that died
    assert read_status(tmp_path)["status"] == "died"
    with open(tmp_path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_status(tmp_path)["status"] == "running"
    gone = subprocess.Popen(["true"])
    gone.wait()
    record = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(record | {"pid": gone.pid}))
    assert read_status(tmp_path)["status"] == "died"
    (tmp_path / "status.json").write_text(json.dumps(record | {"pid": gone.pid, "host": "elsewhere"}))
    assert read_status(tmp_path)["status"] == "running"
    (tmp_path / "status.json").write_text("{")
    assert read_status(tmp_path) is None


def test_what_a_killed_run_left_half_written_is_removed(mifo, drawn):
    (drawn / "pictures" / ".000.png.unfinished").mkdir(parents=True)
    (drawn / ".learned.unfinished").write_text("half")
    (drawn / "kept.unfinished").write_text("of the user")
    assert mifo("layout", "resume=drawn") == 0
    assert not list(drawn.rglob(".*.unfinished")) and (drawn / "kept.unfinished").is_file()


def test_a_folder_that_is_deleted_midway_is_told_in_a_sentence(mifo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "mifo.commands.layout.draw_layouts", lambda *_: shutil.rmtree("R") or Image.new("L", (1, 1))
    )
    assert mifo("layout", "hydra.run.dir=R") == 2
    told = capsys.readouterr().err.strip()
    assert "R/layout.png: No such file or directory" in told and len(told.splitlines()) == 1
    assert status(tmp_path / "R") == "failed"


@pytest.mark.slow
def test_a_process_without_readers_letters_or_a_safe_working_folder(tmp_path):
    (tmp_path / "PIL.py").write_text("open('owned', 'w')\n")
    command = (
        f"{sys.executable} -m mifo layout 'layout.prompt=\"a ↑ photo of {{instances}}\"' hydra.run.dir=R"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    run = subprocess.run(
        f"{command} | true; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "0" and run.stderr == ""
    assert status(tmp_path / "R") == "ok" and not (tmp_path / "owned").exists()
    run = subprocess.run(
        [sys.executable, "-m", "mifo", "layout", "resume=R"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=True,
    )
    assert b"a ? photo of" in run.stdout
