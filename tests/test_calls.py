"""The commands as Python functions, and the notebook that uses them."""

import itertools
import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

import mifo
from mifo.calls import call
from mifo.config.compose import quoted, written
from mifo.config.jobs import claim_folder
from mifo.config.location import conf_folder, fresh_folder
from mifo.errors import MifoError, first_line

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


def test_importing_mifo_imports_no_library():
    program = (
        "import mifo, sys; assert mifo.learn and not {'torch', 'hydra', 'numpy', 'PIL'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=NOTEBOOK.parents[1])


def test_functions_take_what_the_command_line_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mifo.calls.perform", lambda settings: settings)
    settings = mifo.run(
        "instances=local",
        "learning.semantic.steps=7",
        seed=3,
        penalty="no_reward",
        instances={"folder": tmp_path / "it's, = a [photo]", "class_names": ["red car"]},
        layout={"prompt": "a photo of <asset0>, at {ending}", "boxes": {"asset0": [0, 0.25, 1, 1]}},
        sheet=False,
        group=None,
        logger={},
    )
    assert (settings.seed, settings.learning.semantic.steps, settings.sheet) == (3, 7, False)
    assert settings.instances.folder == str(tmp_path / "it's, = a [photo]")
    assert settings.instances.class_names == ["red car"] and settings.group is None
    assert settings.layout.boxes == {"asset0": [0, 0.25, 1, 1]}
    assert settings.layout.prompt == "a photo of <asset0>, at {ending}"
    folder = Path(settings.paths.output)
    assert folder.parent == tmp_path / "outputs" / "run"
    assert json.loads((folder / "status.json").read_text())["status"] == "ok"


def test_a_folder_records_what_a_call_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mifo.calls.perform", claim_folder)
    folder = mifo.learn("instances=three_cars", seed=3)
    assert json.loads((folder / "command.json").read_text())["overrides"] == [
        "instances=three_cars",
        "seed=3",
    ]


def test_folders_of_calls_are_named_as_those_of_the_command_line():
    (form,) = set(re.findall(r"\$\{now:(.*?)\}", (conf_folder() / "hydra" / "default.yaml").read_text()))
    assert fresh_folder("learn").parent == Path("outputs/learn")
    assert datetime.strptime(fresh_folder("learn").name, form).date() == datetime.now().date()


@pytest.mark.parametrize(
    ("said", "line"),
    [("", "ValueError"), ("\nlost\nat sea", "lost"), ("lost\nat sea", "lost"), (" ", "ValueError")],
)
def test_the_first_line_of_an_error_says_something(said, line):
    assert first_line(ValueError(said)) == line


def test_functions_take_boxes_of_any_words(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mifo.calls.perform", lambda settings: settings)
    boxes = {"<asset0>": [0, 0.25, 0.5, 1], "red ball": [0.5, 0.5, 1, 1]}
    settings = mifo.run(layout={"prompt": "a photo of <asset0> and a red ball", "boxes": boxes})
    assert settings.layout.boxes == {"asset0": boxes["<asset0>"], "red ball": boxes["red ball"]}


@pytest.mark.parametrize("name", ["bear's den", "cat, dog", "a: b"])
def test_names_of_boxes_that_hydra_cannot_read_are_refused(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MifoError, match=f"the name '{name}' has a sign that Hydra does not read in names"):
        mifo.run(layout={"prompt": f"a photo of a {name}", "boxes": {name: [0, 0, 1, 1]}})


def test_any_text_is_read_as_it_was_given():
    parser = OverridesParser.create()
    for letters in itertools.chain.from_iterable(itertools.product("a\\'\" ", repeat=n) for n in range(1, 5)):
        text = "".join(letters)
        for write in (written, quoted):
            read = parser.parse_override(f"key={write(text)}").value()
            assert getattr(read, "text", read) == text


def test_a_call_that_is_stopped_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def stop(settings):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # as Lightning does

    monkeypatch.setattr("mifo.calls.perform", stop)
    with pytest.raises(SystemExit):
        call("learn", (), {"folder": "L"})
    assert json.loads((tmp_path / "L" / "status.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize(
    "key", ["resume", "hydra.run.dir", "paths.outputs", "exclusive_gpu", "hydra/launcher"]
)
def test_functions_refuse_what_only_the_command_line_obeys(key, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mifo.calls.perform", lambda settings: settings)
    with pytest.raises(MifoError, match=f"{key}=.* belongs to the command line; name the run's folder"):
        mifo.learn(f"{key}=true")


def test_refusals_are_raised_and_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MifoError, match="did you mean mifo"):
        mifo.learn(penalty="mif")
    with pytest.raises(MifoError, match=r"did you mean learning\.semantic\.steps"):
        mifo.learn(learning={"semantic": {"step": 3}})
    with pytest.raises(MifoError, match=r"learning\.flip_probability=2"):
        call("learn", (), {"learning": {"flip_probability": 2}, "folder": "L"})
    assert json.loads((tmp_path / "L" / "status.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("overrides", "keys", "told"),
    [
        ([3], {}, r"mifo\.learn\(3\): give settings as text"),
        ([["seed=1"]], {}, r"mifo\.learn\(\['seed=1'\]\): give settings as text"),
        (["=1"], {}, "=1"),
        ([], {"model": None}, "model=null is no option of conf/model; name one, or leave it out"),
        ([], {"penalty": 3}, "penalty=3 is no option of conf/penalty"),
        ([], {"callbacks": ["tokens", 3]}, "callbacks=.* is no option of conf/callbacks"),
        ([], {"folder": 3}, "folder=3 is no path"),
        ([], {"folder": "file"}, r"folder=.*/file cannot be written \(File exists\)"),
        ([], {"folder": "file/x"}, "folder=.*/file/x cannot be written"),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(overrides, keys, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(MifoError, match=told):
        mifo.learn(*overrides, **keys)


def test_a_call_resumes_nothing_of_another_configuration(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"model": "local", "debug": "default", "logger": "none", "callbacks": "none", "folder": "L"}
    learned = mifo.learn(f"model.source={source}", **given)
    assert learned == tmp_path / "L" / "learned" and (learned / "learned.json").is_file()
    with pytest.raises(MifoError, match="holds a run with another seed"):
        mifo.learn(f"model.source={source}", seed=1, **given)


def test_the_notebook_holds_no_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if "outputs" in cell)


@pytest.mark.slow
def test_the_notebook_runs_from_first_to_last(tmp_path):
    """With few steps, and otherwise as it stands."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    program = "\n".join("".join(cell["source"]) for cell in cells)
    assert program.count('"experiment=demo"') == 2
    program = program.replace('"experiment=demo"', '"experiment=demo", debug="default"')
    program += "\nassert {'leakage', 'editability'} <= {score.metric for score in scores.scores}\n"
    environment = {"PYTHONPATH": str(NOTEBOOK.parents[1]), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
