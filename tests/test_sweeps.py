"""Sweeps that are given again: what is done is kept, wherever it lies, and no job takes another's folder."""

import fcntl
import json
import os
import socket
import time
from itertools import count
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import pytest
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf

from mifo.config import jobs
from mifo.config.compose import compose, settings_of
from mifo.config.identity import CodeVersion
from mifo.config.jobs import claim_folder, read_status, unlock_folders, write_status
from mifo.config.sweeps import is_kept, place_of_job, remember
from mifo.metrics.evaluation import Evaluation
from mifo.metrics.scores import Evaluator, Score


def make(settings):
    """A run that takes no time."""
    folder = claim_folder(settings)
    score = Score("leakage", settings.seed / 100, False, Evaluator("colour", "0" * 12), "test")
    Evaluation((score,), ()).save(folder / "scores.json")


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """`sweep("S", 1, 2)` runs a job for each seed, as Hydra would; returns its folders and the seeds made."""
    monkeypatch.chdir(tmp_path)
    composed = compose("run", ["paths.output=x", "callbacks=none", "logger=none"])
    OmegaConf.set_struct(composed, False)

    def run(folder, *seeds, fail=False, **changes):
        places, made = [], []
        for number, seed in zip(count(), seeds):
            config = composed.copy()
            for key, value in changes.items():
                OmegaConf.update(config, key.replace("__", "."), value)
            config.seed, config.hydra = seed, {"sweep": {"dir": folder}, "job": {"num": number}}
            place = Path(os.path.abspath(os.path.join(folder, place_of_job(_root_=config))))
            places.append(str(place.relative_to(tmp_path)))
            del config["hydra"]
            if not is_kept(place, config):
                config.paths.output = str(place)
                made.append(seed)
                place.mkdir(parents=True, exist_ok=True)
                write_status(place, "running", [])
                if not fail:
                    make(settings_of(config))
                write_status(place, "failed" if fail else "ok", [])
            unlock_folders()
        return places, made

    yield run
    unlock_folders()


def test_more_values_make_what_is_new_and_no_number_is_taken_twice(sweep):
    assert sweep("S", 1, 2) == (["S/0", "S/1"], [1, 2])
    assert sweep("S", 1, 3, 2) == (["S/0", "S/2", "S/1"], [3])
    assert sweep("S", 4, 3) == (["S/3", "S/2"], [4])


def test_what_is_done_is_kept_in_whatever_folder_it_lies(sweep, tmp_path):
    assert sweep("S", 1, 2)[1] == [1, 2]
    assert sweep("T", 2, 3, 1) == (["S/1", "T/1", "S/0"], [3])
    assert (tmp_path / "T" / "0").resolve() == tmp_path / "S" / "1" and (tmp_path / "T" / "2").is_symlink()
    assert sweep("U", 2, again=True) == (["U/0"], [2])
    (tmp_path / "S").rename(tmp_path / "V")  # it is known by its place, unless it is the sweep's own
    assert sweep("V", 1, 2) == (["V/0", "V/1"], [])
    (tmp_path / "V" / "0" / "scores.json").unlink()  # the run goes on
    assert sweep("W", 1) == (["V/0"], [1])


def test_a_run_that_was_begun_alone_is_found(sweep, tmp_path):
    config = compose("run", [f"paths.output={tmp_path}/alone", "callbacks=none", "logger=none", "seed=5"])
    make(settings_of(config))
    write_status(tmp_path / "alone", "ok", [])
    remember(config, tmp_path / "alone")
    assert sweep("S", 5) == (["alone"], [])


def test_a_run_that_was_killed_at_its_beginning_keeps_its_folder(sweep, tmp_path):
    sweep("S", 1)
    for name in ("config.yaml", "scores.json", "status.json"):
        (tmp_path / "S" / "0" / name).unlink()
    assert sweep("S", 2) == (["S/1"], [2])
    assert sweep("S", 1) == (["S/0"], [1])
    for path in (tmp_path / "S" / "0").iterdir():  # killed before anything was written
        path.unlink()
    assert sweep("S", 3, 1) == (["S/0", "S/2"], [3, 1])


def test_other_settings_and_other_code_are_other_runs(sweep, monkeypatch):
    assert sweep("S", 1)[1] == sweep("S", 1, learning__semantic__steps=7)[1] == [1]
    assert sweep("S", 1, sheet=False)[1] == sweep("S", 1, tags=["a"])[1] == []
    monkeypatch.setattr("mifo.config.sweeps.code_version", lambda: CodeVersion("f" * 12, None, None))
    assert sweep("T", 1) == (["T/0"], [1])
    assert sweep("S", 1) == (["T/0"], [])


def test_a_failed_job_is_tried_again_and_a_bad_one_takes_no_folder_of_another(sweep):
    assert sweep("S", 1, 13, fail=True)[1] == [1, 13]
    assert sweep("S", 13) == (["S/1"], [13])
    assert sweep("S", 1) == (["S/0"], [1])
    bad = {"learning__semantic__steps": "ten", "fail": True}
    assert sweep("S", 1, 2, **bad)[0] == ["S/2", "S/2"]


def test_a_job_waits_for_another_process_that_makes_the_same_run(sweep, tmp_path):
    sweep("S", 1)
    (entry,) = (tmp_path / "multirun" / ".runs").iterdir()
    other = os.open(entry / ".lock", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    Timer(1.0, os.close, [other]).start()
    began = time.monotonic()
    assert sweep("S", 1)[1] == [] and time.monotonic() - began > 0.9


def test_a_folder_in_use_is_passed_over(sweep, tmp_path):
    (tmp_path / "S" / "0").mkdir(parents=True)
    with open(tmp_path / "S" / "0" / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert sweep("S", 1) == (["S/1"], [1])


@pytest.mark.slow
def test_a_sweep_given_again_is_summed_up_as_a_whole(mifo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mifo.commands.run.run", make)
    assert mifo("run", "-m", "seed=1,x", "hydra.sweep.dir=S") == 1
    capsys.readouterr()
    assert mifo("run", "-m", "seed=2,1") == 0
    (folder,) = (tmp_path / "multirun" / "run").iterdir()
    assert (folder / "1").resolve() == tmp_path / "S" / "0"
    assert capsys.readouterr().out.count("│ ok") == 2


def test_a_run_on_another_host_is_dead_after_ten_minutes_without_a_sign_of_life(tmp_path):
    write_status(tmp_path, "running", [])
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(status | {"host": f"not-{socket.gethostname()}"}))
    lock = tmp_path / ".lock"
    lock.touch()
    assert read_status(tmp_path)["status"] == "running"
    os.utime(lock, (time.time() - 601,) * 2)
    assert read_status(tmp_path)["status"] == "died"
    lock.unlink()  # of a version that gave no signs
    assert read_status(tmp_path)["status"] == "running"


def test_a_process_that_lives_gives_signs(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_BEAT", 0.05)
    jobs._start_beating.cache_clear()
    jobs.lock_folder(tmp_path)
    os.utime(tmp_path / ".lock", (0, 0))
    until = time.monotonic() + 5
    while (tmp_path / ".lock").stat().st_mtime < 1 and time.monotonic() < until:
        time.sleep(0.02)
    assert (tmp_path / ".lock").stat().st_mtime > 1
    unlock_folders()


def test_a_sweep_composes_one_job_of_each_combination_of_options_beforehand():
    jobs = [[f"penalty={penalty}", f"seed={seed}"] for penalty in ("mifo", "none") for seed in range(9)]
    composed = []
    loader = SimpleNamespace(
        load_sweep_config=lambda master_config, sweep_overrides: composed.append(sweep_overrides)
    )
    context = SimpleNamespace(config_loader=loader)
    Sweeper.validate_batch_is_legal(SimpleNamespace(hydra_context=context, config={}), jobs)
    assert composed == [jobs[0], jobs[9]]


def test_a_combination_that_cannot_be_composed_stops_a_sweep_before_its_first_job(
    mifo, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert mifo("layout", "-m", "seed=1,2", "layout=row,nosuch", "hydra.sweep.dir=S") == 2
    assert "layout=nosuch does not exist" in capsys.readouterr().err and not [*tmp_path.glob("S/[0-9]*")]
