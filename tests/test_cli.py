"""The command line: every task on a tiny pipeline, one sentence for each refusal, sweeps, resuming."""

import json
import shutil

import pytest
import torch
import wandb
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_pipeline

from mifo import cli
from mifo.errors import MifoError
from mifo.metrics.evaluation import Evaluation, PictureEvaluator


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return [f"model.source={tiny_pipeline(tmp_path_factory.mktemp('pipeline'))}", "model=local"]


def only(folder):
    """The one entry of a folder."""
    (entry,) = folder.iterdir()
    return entry


def status(folder):
    return json.loads((folder / "status.json").read_text())["status"]


def test_help_lists_every_task_and_its_keys(mifo, capsys):
    assert mifo("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"  {task} " in shown for task in cli.TASKS)
    assert mifo("learn", "--help") == 0
    shown = capsys.readouterr().out
    assert "penalty: break_a_scene" in shown and "learning_rate" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lern"], "'lern' is no task"),
        (["learn", "lerning.semantic.steps=3"], "did you mean learning"),
        (["learn", "learning.semantic.step=3"], "did you mean learning.semantic.steps?"),
        (["learn", "learning.semantic.steps=ten"], "learning.semantic.steps: Value 'ten'"),
        (["learn", "seed=x"], "could not be converted to Integer; take a whole number"),
        (["learn", "seed=null"], "for field of type 'int'; give a value, or leave it out for its default"),
        (["learn", "penalty.terms.penalty.weight=x"], "could not be converted to Float; take a number"),
        (["learn", "learning.union_sampling=x"], "is not a valid bool (type str); take true or false"),
        (
            ["learn", "tags=x"],
            "tags: Invalid value assigned: one value is not a ListConfig, list or tuple; write",
        ),
        (
            ["export", "learned=[A,B]"],
            "learned: Cannot convert 'ListConfig' to string: '['A', 'B']'; take one value",
        ),
        (["learn", "penalty=mif"], "did you mean mifo?"),
        (["learn", "callbacks=[tokens,progres]"], "callbacks=progres does not exist; did you mean progress?"),
        (["learn", "-m", "penalty=3,4"], "penalty=3,4 is no option of conf/penalty; name one"),
        (["learn", "~method=3"], "~method=3 is no option of conf/method"),
        (["learn", "penalty.terms.penalty.loss=rewrd"], "loss=rewrd"),
        (["learn", "penalty.terms.penalty.stage=third"], "penalty.terms.penalty.stage"),
        (["learn", "penalty.terms.penalty.wight=1"], "penalty.terms.penalty.wight"),
        (["learn", "trainer.acceleratr=cpu"], "did you mean accelerator?"),
        (["learn", "+logger.mine.name=x"], "logger.mine needs a _target_"),
        (["learn", "+logger.mine._target_=no.such"], "logger.mine._target_=no.such needs the package no"),
        (["learn", "device=tpu"], "device=tpu"),
        (["learn", "model=local"], "model.source must be given"),
        (["learn", "instances=local"], "instances.folder"),
        (["learn", "instances=local", "instances.folder=nowhere"], "nowhere"),
        (["learn", "resume=nowhere"], "nowhere: no run to go on with"),
        (["run", "layout=custom"], "layout.prompt must be given"),
        (["run", 'layout.prompt="a photo of <asset7>"'], "<asset7>"),
        (["run", "layout.prompt=a <b>"], "quote"),
        (["run", "layout.arrange=circle"], "layout.arrange"),
        (["run", "layout.boxes={asset0: [0, 0, 1.5, 1]}"], "<asset0>"),
        (["run", "layout.boxes={asset0: [0, 0.9, 1, 0.1]}"], "upside down"),
        (["run", "layout.boxes={asset0: here}"], "layout.boxes.asset0=here"),
        (["run", "layout.boxes={kitten: [0, 0, 1, 1]}"], "kitten"),
        (
            ["run", "layout.boxes={asset0: [0.2, 0.3, 0.21, 0.9]}"],
            "<asset0>, [0.2, 0.3, 0.21, 0.9], is too small",
        ),
        (["run", 'layout.prompt="a photo of a cart"', "layout.boxes={car: [0, 0, 1, 1]}"], "a box for 'car'"),
        (["run", f'layout.prompt="a photo of a {"very " * 80}big car"', "layout.arrange=null"], "shorten"),
        (["run", "guidance.layers=[99]"], "guidance.layers names layer 99"),
        (
            ["run", "guidance.clusters_per_subject=0", "guidance.shapes_from=1"],
            "guidance.clusters_per_subject=0",
        ),
        (["run", "guidance.restarts=0"], "guidance.restarts=0"),
        (["run", "guidance.shapes_from=0"], "guidance.shapes_from=0"),
        (["run", "guidance.iterations=-1"], "guidance.iterations=-1"),
        (["run", "layout.endings=[at sea, in snow]", "layout.prompt=a photo"], "has no {ending}, so that 2"),
        (["run", "objectives=[leakage]", "metrics=none"], "objectives=leakage is measured by metrics"),
        (["learn", "learning.prior.batch_size=0"], "learning.prior.batch_size=0 is too small"),
        (["run", "guidance.margin=-0.1"], "guidance.margin=-0.1 is too small; take at least 0"),
        (
            ["run", "guidance.margin=0.2"],
            "is too small: make each side at least 1/16 of the picture and twice",
        ),
        (["run", "synthesis.steps=0"], "synthesis.steps=0"),
        (["run", "synthesis.steps=1001"], "1001 sampling steps"),
        (["run", "synthesis.samples=0"], "synthesis.samples=0"),
        (
            ["run", "synthesis.guidance_scale=-1"],
            "synthesis.guidance_scale=-1.0 is too small; take at least 0",
        ),
        (["learn", "learning.prior.guidance_scale=-1"], "learning.prior.guidance_scale=-1.0 is too small"),
        (["learn", "synthesis.samples=0"], "synthesis.samples=0"),
        (["run", "synthesis.negative_prompt=" + "x" * 200], "shorten"),
        (["learn", "learning.semantic.learning_rate=-1"], "learning.semantic.learning_rate=-1"),
        (["learn", "learning.finetuning.betas=[0.9, 1]"], "learning.finetuning.betas"),
        (["learn", "learning.finetuning={trainable: lora, lora_rank: 0}"], "learning.finetuning.lora_rank=0"),
        (["learn", "performance.threads=-1"], "performance.threads=-1"),
        (["synthesize", "learned=nowhere", "synthesis.samples=0"], "synthesis.samples=0"),
        (["quality", "parts=[none]", "guidance.shapes_from=0"], "guidance.shapes_from=0"),
        (["quality", "box_prompts=0"], "error: box_prompts=0 is too small; take at least 1"),
        (["quality", "scenes=4"], "error: scenes=4 is too small; take at least 64"),
        (["pretrain", "pretraining.minutes=-1"], "pretraining.minutes=-1.0 must be above 0"),
        (["quality", "parts=[]"], "parts=[] measures nothing; choose from reconstruction"),
        (["calibrate", "scenes=three_cars"], "list or tuple; write it as [ONE, OTHER]"),
        (["calibrate", "scenes=[one_car,three_cars]"], "one_car has one thing and others have several"),
        (["calibrate", "metrics=none"], "not Optional; give a value, or leave it out for its default"),
        (
            ["masks", "picture=a.png", "boxes=[[0,0,1,1]]"],
            "boxes: Cannot merge DictConfig with ListConfig; write it as {NAME: VALUE}",
        ),
        (["masks", "instances=one_car", "boxes={car: [0,0,1,1]}"], "boxes and points make new masks"),
        (["masks", "instances=one_car", "points={car: [[0,1]]}"], "boxes and points make new masks"),
        (
            ["synthesize", "learned=A", "layout.boxes={0: [0,0,1,1]}"],
            "incompatible with (str); take words as names",
        ),
        (["learn", "instances=my/photo"], "take instances=local instances.folder=my/photo"),
        (
            ["learn", "instances.class_names=cat,mug"],
            "a list as 'instances.class_names=[cat,mug]', or add -m",
        ),
        (
            ["learn", "instances.class_names=[<cat>]"],
            "[<cat>] cannot be read; close every bracket, and quote",
        ),
        (["synthesize"], "learned must be given"),
        (["synthesize", "learned=nowhere"], "nowhere"),
        (["evaluate", "pictures=nowhere"], "nowhere"),
        (["speedrun", "leaderboard=."], "leaderboard=. is a folder; name a file, such as leaderboard.csv"),
        (["evaluate", "pictures=nowhere", "metrics=none"], "metrics=none"),
        (["layout", "picture=nowhere.png"], "picture=nowhere.png"),
        (["layout", "layout.prompt=a carpet", "layout.boxes={car: [0, 0, 1, 1]}"], "a box for 'car', but"),
        (
            ["layout", "layout.prompt=''", "layout.boxes={}"],
            "layout.prompt and its ending leave an empty",
        ),
        (["learn", "seed=-1"], "seed=-1"),
        (["learn", "model.dtype=int8"], "model.dtype=int8 is not known; take one of float32"),
        (["run", "model=local", "model.source=/etc/passwd"], "model.source=/etc/passwd is a single file"),
        (["learn", "learning.semantic.betas=[0.9]"], "learning.semantic.betas=[0.9]"),
        (["learn", "instances.class_names=['',cat]"], "instances.class_names has an empty name"),
        (["learn", "instances.class_names=[[1]]"], "instances.class_names[0]=[1] is no str"),
        (["run", "objectives=[[leakage]]"], "objectives[0]=['leakage'] is no str"),
        (["learn", "trainer.devices=2"], "trainer.devices and trainer.num_nodes must be 1"),
        (["learn", "trainer.devices=auto"], "trainer.devices"),
        (["learn", "+trainer.log_every_n_steps=0"], "trainer.log_every_n_steps must be at least 1"),
        (
            ["learn", "+callbacks.mine._target_=pathlib.Path"],
            "callbacks.mine._target_=pathlib.Path is no Callback",
        ),
        (["learn", "+callbacks.mine._target_=builtins.dict"], "_target_=builtins.dict has no arguments that"),
        (["learn", "+callbacks.mine._target_=os.name"], "callbacks.mine._target_=os.name has no arguments"),
        (["learn", "+callbacks.mine._target_=__main__.no"], "_target_=__main__.no cannot be imported"),
        (["learn", "+logger.mine._target_=mifo.callbacks.announce.Announce"], "is no Logger of Lightning"),
        (["learn", "logger=wandb", f"tags=[ok,{'x' * 65}]"], "65 letters; take 1 to 64"),
        (["learn", "logger=wandb", "logger.wandb.project=a/b"], "logger.wandb.project=a/b is no name"),
        (["learn", "logger=wandb", f"group={'x' * 129}"], "129 letters"),
        (["learn", "logger=wandb", "group=null", f"method={'x' * 129}"], "method"),
        (["learn", "--seed=1"], "unrecognized arguments: --seed=1; keys are given as key=value"),
        (["learn", "--cfg", "task"], "invalid choice: 'task'"),
        (["learn", "-m", "--cfg", "job", "seed=1,2"], "only one can be given"),
        (["learn", "resume=nowhere", "-m"], "leave out -m"),
    ],
)
def test_refusals_are_one_sentence_before_any_model_is_loaded(mifo, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr("mifo.commands.learn.load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("mifo.commands.synthesize.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert mifo(*arguments) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("mifo: error: ") and len(told.splitlines()) == 1
    assert words in told


def test_a_layout_that_cannot_be_drawn_is_refused_before_the_model_is_loaded(
    mifo, model, capsys, monkeypatch
):
    assert mifo("learn", *model, "debug=default", "logger=none", "hydra.run.dir=L") == 0
    monkeypatch.setattr("mifo.commands.synthesize.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert mifo("synthesize", *model, "learned=L", "layout.boxes={asset0: [0.2, 0.3, 0.21, 0.9]}") == 2
    assert "<asset0>, [0.2, 0.3, 0.21, 0.9], is too small" in capsys.readouterr().err


def test_missing_evaluators_are_refused_before_learning(mifo, model, capsys, monkeypatch):
    def refuse(settings, device):
        raise MifoError("no weights")

    monkeypatch.setattr(PictureEvaluator, "from_settings", refuse)
    monkeypatch.setattr("mifo.commands.learn.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert mifo("run", *model) == 2
    assert "no weights" in capsys.readouterr().err


def test_layout_draws_the_boxes_over_a_picture(mifo, tmp_path, capsys):
    Image.new("RGB", (40, 40), "white").save(tmp_path / "white.png")
    assert mifo("layout", "picture=white.png", "layout.boxes={asset1: [0.25, 0.25, 0.75, 0.75]}") == 0
    drawn = Image.open(only(tmp_path / "outputs" / "layout") / "layout.png").convert("RGB")
    assert drawn.getpixel((5, 5)) == (255, 255, 255)
    assert len(drawn.getcolors(maxcolors=100_000)) > 1
    assert "a photo of <asset0> and <asset1> and <asset2>" in capsys.readouterr().out


def test_a_run_without_a_sheet_has_its_scores(mifo, model, tmp_path, capsys):
    assert mifo("run", *model, "debug=default", "logger=none", "sheet=false") == 0
    folder = only(tmp_path / "outputs" / "run")
    assert (folder / "scores.json").is_file() and not list(folder.glob("contact_sheet*"))
    told = capsys.readouterr().out
    assert "contact sheet" not in told
    assert all(f"{part} took " in told for part in ("learning", "synthesis", "evaluation"))


def test_run_makes_everything_and_resuming_it_makes_nothing_anew(mifo, model, tmp_path, capsys):
    assert mifo("run", *model, "debug=default", "logger=csv", "penalty.reward_steps=2") == 0
    folder = only(tmp_path / "outputs" / "run")
    assert "mifo, penalty.reward_steps=2<" in (folder / "contact_sheet.html").read_text()
    told = capsys.readouterr().out
    assert "contact_sheet.png" in told and "contact_sheet.html" in told and "editability" in told
    assert status(folder) == "ok"
    assert Evaluation.read(folder / "scores.json").scores
    assert "semantic/loss/total" in (folder / "csv" / "version_0" / "metrics.csv").read_text()
    made = {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*.*")
        if path.suffix in (".safetensors", ".png")
    }
    assert mifo("run", f"resume={folder}") == 0
    assert made == {path: path.stat().st_mtime_ns for path in made}

    # what was deleted is made again, and the same
    before = (folder / "pictures" / "000.png").read_bytes()
    for path in (folder / "pictures").iterdir():
        path.unlink()
    assert mifo("run", f"resume={folder}") == 0
    assert (folder / "pictures" / "000.png").read_bytes() == before


def test_a_run_goes_on_after_a_kill_while_something_was_written(mifo, model, tmp_path, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mifo.data.saved_pictures.write_whole", kill)
        assert mifo("run", *model, "debug=default", "logger=none") == 130
    folder = only(tmp_path / "outputs" / "run")
    assert not (folder / "pictures" / "pictures.json").exists()
    assert (folder / "pictures" / "instances.yaml").is_file()
    with monkeypatch.context() as patched:
        patched.setattr("mifo.report.sheet.write_whole", kill)
        assert mifo("run", f"resume={folder}") == 130
    assert (folder / "contact_sheet.png").is_file() and not (folder / "contact_sheet.html").exists()
    # as versions before this one left it
    scores = (folder / "scores.json").read_text()
    (folder / "scores.json").write_text(scores[: len(scores) // 2])
    assert mifo("run", f"resume={folder}") == 0
    assert (folder / "scores.json").read_text() == scores
    assert (folder / "contact_sheet.html").is_file()


def test_the_three_tasks_one_by_one_make_what_run_makes(mifo, model, tmp_path):
    assert mifo("run", *model, "debug=default", "logger=none") == 0
    assert mifo("learn", *model, "debug=default", "logger=none") == 0
    learned = only(tmp_path / "outputs" / "learn")
    assert mifo("synthesize", *model, "debug=default", f"learned={learned}") == 0
    pictures = only(tmp_path / "outputs" / "synthesize")
    assert mifo("evaluate", f"pictures={pictures}") == 0
    scores = Evaluation.read(only(tmp_path / "outputs" / "evaluate") / "scores.json")
    at_once = only(tmp_path / "outputs" / "run")
    assert (pictures / "pictures" / "000.png").read_bytes() == (at_once / "pictures" / "000.png").read_bytes()
    assert scores == Evaluation.read(at_once / "scores.json")


def test_pictures_are_scored_against_their_own_instances_and_another_measure_is_told(
    mifo, model, tmp_path, capsys
):
    boxes = "layout.boxes={asset2: [0, 0, 0.5, 1], photo: [0.5, 0, 1, 1]}"
    assert mifo("run", *model, "debug=default", "logger=none", boxes, "hydra.run.dir=R") == 0
    assert mifo("evaluate", "pictures=R", "instances=alike_two_cups") == 2
    assert "show <asset2>, but alike_two_cups has <asset0>, <asset1>" in capsys.readouterr().err
    assert not (only(tmp_path / "outputs" / "evaluate") / "scores.json").exists()

    recorded = tmp_path / "R" / "config.yaml"
    assert mifo("evaluate", "pictures=R") == 0
    assert "measured with another metrics.protocol" in capsys.readouterr().out
    assert mifo("evaluate", "pictures=R", "metrics=standard", "metrics.batch_size=1") == 0
    assert "measured with another" not in capsys.readouterr().out

    run = OmegaConf.load(recorded)
    del run.metrics  # as a run of synthesize, which measures nothing
    OmegaConf.save(run, recorded)
    assert mifo("evaluate", "pictures=R") == 0
    assert "made with local, but metrics=miniature" in capsys.readouterr().out


def test_what_was_learned_alone_is_not_evaluated(mifo, tmp_path, capsys):
    (tmp_path / "L" / "learned").mkdir(parents=True)
    (tmp_path / "L" / "learned" / "learned.json").write_text("{}")
    for folder in ("L", "L/learned"):
        assert mifo("evaluate", f"pictures={folder}") == 2
        assert f"that mifo synthesize learned={folder} makes" in capsys.readouterr().err


def test_pictures_that_are_there_are_kept_when_a_sweep_is_repeated_or_resumed(mifo, model, tmp_path, capsys):
    assert mifo("learn", *model, "debug=default", "logger=none", "hydra.run.dir=L") == 0
    again = ["synthesize", "-m", *model, "debug=default", "learned=L", "hydra.sweep.dir=S"]
    assert mifo(*again, "seed=1,x") == 1
    listing = tmp_path / "S" / "0" / "pictures" / "pictures.json"
    made = listing.stat().st_mtime_ns
    assert mifo(*again, "seed=1,2") == 0
    assert [status(tmp_path / "S" / number) for number in "01"] == ["ok", "ok"]
    assert "0/pictures (made before with the same settings, and kept)" in capsys.readouterr().out
    assert mifo("synthesize", "resume=S/0") == 0
    assert listing.stat().st_mtime_ns == made

    # other settings, and pictures that nobody knows the settings of
    assert mifo(*again, "seed=3") == 1
    assert "another seed" in json.loads((tmp_path / "S" / "0" / "status.json").read_text())["error"]
    (tmp_path / "S" / "0" / "config.yaml").unlink()
    for _ in range(2):
        assert mifo(*again[:1], *again[2:-1], "seed=1", "hydra.run.dir=S/0") == 2
        assert "already holds pictures" in capsys.readouterr().err
    assert listing.stat().st_mtime_ns == made
    listing.unlink()  # pictures of somebody else's
    mine = (tmp_path / "S" / "0" / "pictures" / "000.png").read_bytes()
    for command in (again[:1] + again[2:-1], ["run", *model, "debug=default"]):
        assert mifo(*command, "seed=1", "hydra.run.dir=S/0") == 2
        assert "already holds pictures" in capsys.readouterr().err
    assert (tmp_path / "S" / "0" / "pictures" / "000.png").read_bytes() == mine


def test_results_made_anew_in_one_place_are_not_taken_for_those_before(mifo, model, tmp_path, capsys):
    few = [*model, "debug=default"]
    steps = (
        ["learn", *few, "logger=none", "hydra.run.dir=L"],
        ["synthesize", *few, "learned=L", "hydra.run.dir=S"],
        ["evaluate", "pictures=S", "hydra.run.dir=E"],
    )
    assert [mifo(*step) for step in steps] == [0, 0, 0]
    assert [mifo(*step) for step in steps[1:]] == [0, 0]
    shutil.rmtree(tmp_path / "L")
    assert mifo(*steps[0], "seed=9") == 0
    assert mifo(*steps[1]) == 2
    assert "learned=L changed since the run in" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "S")
    assert mifo(*steps[1]) == 0
    assert mifo(*steps[2]) == 2
    assert "pictures=S changed since the run in" in capsys.readouterr().err


def test_a_folder_is_never_shared_by_two_configurations(mifo, tmp_path, capsys):
    assert mifo("layout", "hydra.run.dir=here", "seed=1") == 0
    drawn = (tmp_path / "here" / "layout.png").read_bytes()
    assert mifo("layout", "hydra.run.dir=here", "seed=2") == 2
    assert "another seed" in capsys.readouterr().err
    assert (tmp_path / "here" / "layout.png").read_bytes() == drawn


def test_a_refused_command_leaves_the_record_of_the_run_in_its_folder_alone(mifo, tmp_path, monkeypatch):
    assert mifo("layout", "hydra.run.dir=here", "seed=1") == 0
    assert mifo("layout", "hydra.run.dir=here", "seed=2") == 2
    assert mifo("layout", "resume=here", "seed=3") == 2
    assert status(tmp_path / "here") == "ok"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert mifo("layout", "resume=../here") == 0
    assert status(tmp_path / "here") == "ok"


@pytest.mark.parametrize(("stop", "code"), [(SIGTERMException, 143), (KeyboardInterrupt, 130)])
def test_a_signal_is_told_by_the_exit_code(mifo, model, tmp_path, monkeypatch, capsys, stop, code):
    def stopped(*_, **__):
        raise stop

    monkeypatch.setattr("mifo.commands.learn.fit", stopped)
    assert mifo("learn", *model, "debug=default", "logger=none", "hydra.run.dir=here") == code
    assert status(tmp_path / "here") == "interrupted"
    told = capsys.readouterr().err
    assert "what is finished stays" in told and f"resume={tmp_path / 'here'}" in told


def test_a_folder_that_cannot_be_written_is_refused_in_one_sentence(mifo, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert mifo("layout", "hydra.run.dir=file") == 2
    assert "check the path" in capsys.readouterr().err


def test_a_server_that_does_not_answer_stops_no_run(mifo, model, tmp_path, monkeypatch, caplog):
    begin, modes = wandb.init, []

    def init(**options):
        modes.append(options.get("mode"))
        if modes[-1] != "offline":
            raise wandb.errors.CommError("no route to host")
        return begin(**options)

    monkeypatch.setattr(wandb, "init", init)
    learn = ["learn", *model, "debug=default", "logger=wandb", "hydra.run.dir=here"]
    assert mifo(*learn) == 0
    assert modes == [None, "offline"] and status(tmp_path / "here") == "ok"
    known = (tmp_path / "here" / "wandb_id.txt").read_text()
    assert known in str([*(tmp_path / "here" / "wandb").iterdir()])


def test_a_server_that_takes_no_artifact_stops_no_run(mifo, model, tmp_path, monkeypatch, capsys):
    def refused(*_, **__):
        raise wandb.errors.AuthenticationError("the service is busy")

    monkeypatch.setattr("mifo.commands.learn.log_learned", refused)
    monkeypatch.setattr("mifo.commands.run.log_evaluation", refused)
    assert mifo("run", *model, "debug=default", "logger=none", "hydra.run.dir=here") == 0
    assert status(tmp_path / "here") == "ok" and (tmp_path / "here" / "contact_sheet.html").is_file()
    assert capsys.readouterr().out.count("did not take everything of this run: the service is busy") == 2


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("logger.wandb.porject=x", "logger.wandb does not take its arguments"),
        ("metrics.batch_size=0", "metrics.batch_size=0 is too small"),
    ],
)
def test_arguments_that_nothing_takes_are_refused(mifo, model, capsys, argument, words):
    assert mifo("run", *model, "debug=default", "logger=wandb", f"++{argument}") == 2
    assert words in capsys.readouterr().err


def test_a_sweep_makes_separate_results_and_a_bad_job_fails_alone(mifo, model, tmp_path, capsys):
    grid = ["penalty=mifo,none", "learning.semantic.steps=3,ten"]
    assert mifo("learn", "-m", *model, "debug=default", "logger=none", *grid) == 1
    jobs = only(tmp_path / "multirun" / "learn")
    assert [status(jobs / str(number)) for number in range(4)] == ["ok", "failed", "ok", "failed"]
    assert (
        "learning.semantic.steps: Value 'ten'"
        in json.loads((jobs / "1" / "status.json").read_text())["error"]
    )
    rows = [load_file(jobs / number / "learned" / "tokens.safetensors")["rows"] for number in "02"]
    assert not torch.equal(*rows)
    assert "failed" in capsys.readouterr().out


def test_a_failed_run_is_recorded_and_closes_wandb(mifo, model, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("mifo.commands.learn.fit", lambda *_, **__: 1 / 0)
    codes = []
    finish = wandb.finish
    monkeypatch.setattr(wandb, "finish", lambda exit_code: (codes.append(exit_code), finish(exit_code)))
    with pytest.raises(ZeroDivisionError):
        mifo("learn", *model, "debug=default", "logger=wandb")
    assert codes == [1] and wandb.run is None
    assert status(only(tmp_path / "outputs" / "learn")) == "failed"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"prompt:\n\tx", "layout/my.yaml, line 2: this is not YAML that MIFO reads (found character"),
        (b"prompt: &a [x]\nboxes: [*a, *a]", "layout/my.yaml holds a YAML alias (*name), which is not read"),
        (
            b"prompt: a\nprompt: b\n",
            "layout/my.yaml, line 2: this is not YAML that MIFO reads (found duplicate key",
        ),
        ("# mine\nprompt: café".encode("latin-1"), "layout/my.yaml cannot be read (line 2 is not UTF-8"),
    ],
)
def test_a_configuration_that_is_no_yaml_is_told_by_file_and_line(mifo, tmp_path, capsys, content, words):
    (tmp_path / "layout").mkdir()
    (tmp_path / "layout" / "my.yaml").write_bytes(content)
    assert mifo("layout", "layout=my", "--config-dir", ".") == 2
    told = capsys.readouterr().err.strip()
    assert words in told and len(told.splitlines()) == 1


def test_a_byte_order_mark_hides_no_package(mifo, tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "my.yaml").write_text("\ufeff# @package _global_\nseed: 7\n")
    assert mifo("learn", "experiment=my", "--config-dir", ".", "--cfg", "job") == 0
    assert "\nseed: 7\n" in capsys.readouterr().out


def test_flags_may_stand_anywhere(mifo, tmp_path, capsys):
    assert mifo("layout", "--cfg", "job", "seed=7") == 0
    assert "\nseed: 7\n" in capsys.readouterr().out
    assert mifo("layout", "seed=7", "-m", "layout.arrange=row,spread", "hydra.sweep.dir=S") == 0
    assert [status(tmp_path / "S" / number) for number in "01"] == ["ok", "ok"]


def test_a_sweep_with_folders_in_folders_has_its_summary(mifo, capsys):
    place = ["hydra.sweep.dir=S", "hydra.sweep.subdir='${task}/seed_${seed}'"]
    assert mifo("layout", "-m", "seed=1,x", *place) == 1
    told = capsys.readouterr().out
    assert "layout/seed_1" in told and "layout/seed_x" in told and "failed" in told
