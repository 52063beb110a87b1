"""The configuration groups: what is composed is what the schema and the papers say."""

import re
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torchvision.ops import box_iou

from mifo.config.checks import check
from mifo.config.compose import check_options, compose, settings_of
from mifo.config.location import conf_folder
from mifo.config.schema import SCHEMAS
from mifo.data.layouts import LayoutSettings, layouts
from mifo.errors import MifoError
from mifo.method.backbone import DefaultSites
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.losses.settings import PenaltySettings, TermSettings, TermStage
from mifo.method.losses.timeline import Timeline
from mifo.method.regions.boxes import check_boxes
from mifo.method.synthesis.settings import SynthesisSettings
from mifo.training.settings import LearningSettings

SITES = SimpleNamespace(sites=(), default_sites=DefaultSites((), (), (), ()))  # of a model that reads none
OPTIONS = sorted(conf_folder().rglob("*.yaml"))


def settings(task, *overrides):
    return settings_of(compose(task, ["paths.output=here", *overrides]))


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: str(path.relative_to(conf_folder())))
def test_every_option_says_what_it_is(path: Path):
    lines = path.read_text().splitlines()
    said = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert said.startswith("# ") and len(said) > 10
    assert yaml.safe_load(path.read_text()) is not None


def test_the_card_of_sd21_says_that_it_was_withdrawn_and_which_mirror_it_is():
    card = (conf_folder() / "model" / "sd21.yaml").read_text()
    assert "withdrew" in card.splitlines()[0] and "mirror" in card.splitlines()[0]
    assert "source: sd2-community/" in card


@pytest.mark.parametrize("model", ["sd21", "local"])
def test_stable_diffusion_learns_and_samples_with_the_published_values(model):
    composed = settings("run", f"model={model}", "model.source=folder")
    assert composed.learning.semantic.steps == 600 and composed.learning.semantic.learning_rate == 5e-3
    assert composed.learning.finetuning.steps == 400 and composed.learning.finetuning.learning_rate == 2e-6
    assert composed.guidance == GuidanceSettings()
    assert composed.penalty == PenaltySettings(
        {
            "reward": TermSettings("reward", 1e-2, TermStage.semantic, to_step=200, time_below=0.5),
            "penalty": TermSettings("penalty", 2e-2, TermStage.semantic, from_step=200, time_below=0.5),
            "finetuning": TermSettings("penalty", 2e-2, TermStage.finetuning, time_below=0.5),
        }
    )
    assert composed.synthesis == SynthesisSettings()
    for stage in (composed.learning.semantic, composed.learning.finetuning):
        stage.betas = tuple(stage.betas)
    assert composed.learning == LearningSettings()


@pytest.mark.parametrize("task", ["learn", "run", "evaluate", "pretrain"])
@pytest.mark.parametrize("logger", ["csv", "wandb", "trackio", "tensorboard", "many", "none"])
def test_every_logger_serves_every_task(task, logger):
    given = ["pictures=folder"] if task == "evaluate" else []
    check(settings(task, f"logger={logger}", *given))


@pytest.mark.parametrize("task", ["learn", "run"])
def test_seeds_share_a_group_and_nothing_else_does(task):
    def group(*overrides):
        return settings(task, *overrides).group

    plain = group("seed=1", "tags=[a]", "logger=none")
    assert plain == group("seed=2", "callbacks=none") and plain.startswith("mifo, three_cars ")
    others = [group(each) for each in ("penalty=none", "penalty.terms.penalty.weight=3", "instances=local")]
    assert len({plain, *others}) == 4 and others[0].startswith("penalty=none, three_cars ")
    assert plain == group("penalty=mifo", "seed=3")  # typed, but no other choice
    assert group("group=mine") == "mine"


def test_a_method_whose_parts_are_changed_is_told_with_them():
    given = ["seed=3", "layout=row", "learning.prior.cache=a/b"]
    assert settings("run", *given).told_method == "mifo"
    changed = ["penalty=none", "~recipe", "learning.union_sampling=false"]
    assert settings("run", *changed, *given).told_method == "mifo, penalty=none, ~recipe, " + changed[-1]


def test_learning_follows_the_model_unless_it_is_chosen():
    assert settings("learn").learning.semantic.steps < 600
    assert settings("learn", "model=sd21").learning.semantic.steps == 600
    assert settings("learn", "learning=sd21").learning.semantic.steps == 600


def test_a_method_chooses_its_losses_and_a_later_choice_wins():
    def losses(*chosen):
        return [term.loss for term in settings("learn", *chosen).penalty.terms.values()]

    assert losses("method=break_a_scene") == ["break_a_scene"]
    assert losses("method=break_a_scene", "penalty=none") == []
    assert settings("learn", "method=masked_textual_inversion").learning.finetuning.steps == 0


@pytest.mark.parametrize("task", ["run", "learn", "quality"])
@pytest.mark.parametrize("guidance", ["none", "masks"])
def test_guidance_that_is_off_stays_off(task, guidance):
    debug = [] if task == "quality" else [["debug=default"]]
    for own in (["synthesis=miniature"], ["synthesis=distilled"], *debug):
        assert settings(task, *own, f"guidance={guidance}").guidance.guided_steps == 0


@pytest.mark.parametrize(("model", "weights"), [("miniature", (1, 0.1)), ("sd21", (0.01, 0.01))])
def test_a_reward_that_is_kept_on_is_active_at_every_step(model, weights):
    penalty = settings("learn", "method=reward_kept", f"model={model}").penalty
    for stage, weight in zip(("semantic", "finetuning"), weights, strict=True):
        timeline = Timeline(penalty, stage, 20_000, SITES)
        for step in (0, penalty.reward_steps, 10_000):
            (term,) = timeline.active(step)
            assert (term.settings.loss, timeline.weight(term, step)) == ("reward", weight)


@pytest.mark.parametrize("name", ["demo", "demo_mmdit"])
@pytest.mark.parametrize("task", ["learn", "synthesize", "evaluate", "layout"])
def test_an_experiment_written_for_run_serves_every_command(task, name, mifo, capsys):
    given = {"synthesize": ["learned=L"], "evaluate": ["pictures=P"]}.get(task, [])
    composed = {}
    for each in (task, "run"):
        assert mifo(each, f"experiment={name}", *(given if each == task else []), "--cfg", "job") == 0
        composed[each] = yaml.safe_load(capsys.readouterr().out)
    own, run = composed[task], composed["run"]
    assert own.keys() == asdict(SCHEMAS[task](task=task)).keys() - {"origin"}
    for section in own.keys() & {"model", "learning", "penalty", "layout", "guidance", "synthesis"}:
        assert own[section] == run[section]


@pytest.mark.parametrize(
    "typed",
    [
        "synthesize trainer=cpu",
        "synthesize penalty=none",
        "synthesize experiment=demo learning.semantic.steps=3",
        "learn experiment=demo layout.prompt=x",
        "learn layout=row",
        "learn +layout=row",
        "learn +layout.prompt=x",
        "evaluate -m experiment=demo layout=row,zigzag",
    ],
)
def test_what_is_typed_for_other_commands_is_refused_in_a_sentence(typed, mifo, capsys):
    task, *arguments = typed.split()
    assert mifo(task, *arguments) == 2
    section = re.split(r"[.=]", arguments[-1].lstrip("+"))[0]
    told = f"mifo: error: mifo {task} has no use for {section}; leave it out, or see mifo {task} --help"
    assert capsys.readouterr().err.strip() == told


def test_a_choice_of_an_experiment_that_fits_no_section_is_refused(mifo, tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    text = "defaults:\n  - override /optimizer@learning.semntic.optimizer: prodigy\nseed: 7\n"
    (tmp_path / "experiment" / "my.yaml").write_text(f"# @package _global_\n{text}")
    given = ["experiment=my", "--config-dir", ".", "--cfg", "job"]
    assert mifo("run", *given) == 2
    assert "Did you mean to override one of optimizer@learning.finetuning" in capsys.readouterr().err
    assert mifo("layout", *given) == 0
    assert "\nseed: 7\n" in capsys.readouterr().out


@pytest.mark.parametrize("defaults", ["", "demo", "[3]", "[{}]", "[{/model: a, /layout: b}]"])
def test_defaults_of_another_form_are_told_by_file(mifo, tmp_path, capsys, defaults):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "my.yaml").write_text(f"# @package _global_\ndefaults: {defaults}\nseed: 7\n")
    assert mifo("learn", "experiment=my", "--config-dir", ".", "--cfg", "job") == 2
    assert "experiment/my.yaml: defaults must be a list of NAME and of GROUP: NAME" in capsys.readouterr().err


def test_an_experiment_of_which_a_command_reads_nothing_is_refused(mifo, capsys):
    assert mifo("pretrain", "experiment=demo", "--cfg", "job") == 2
    assert (
        "experiment/demo.yaml sets nothing that mifo pretrain reads; leave it out" in capsys.readouterr().err
    )


def test_sweeps_over_the_options_of_a_group_are_none_without_an_option():
    check_options(
        ["penalty=glob(d*)", "penalty='mifo','dice'", "callbacks=[progress],[tokens]", "layout={boxes: {}}"]
    )
    with pytest.raises(MifoError, match="penalty='mifo',3 is no option of conf/penalty"):
        check_options(["penalty='mifo',3"])


def arranged(arrange, number):
    """The boxes of so many instances, one for each."""
    tokens = [f"<asset{i}>" for i in range(number)]
    (layout,) = layouts(LayoutSettings(arrange=arrange), tokens)
    assert list(layout.boxes) == tokens
    check_boxes(layout.boxes, side=16)
    assert layout.prompt == f"a photo of {' and '.join(tokens)}"
    return list(layout.boxes.values())


@pytest.mark.parametrize("number", range(1, 9))
def test_a_row_gives_each_instance_a_box_of_its_own(number):
    assert all(left[2] < right[0] for left, right in pairwise(arranged("row", number)))


@pytest.mark.parametrize("number", range(1, 9))
def test_spread_boxes_stay_apart(number):
    edges = torch.tensor(arranged("spread", number))
    assert edges.min() >= 0.039 and edges.max() <= 0.961
    sides = edges[:, 2:] - edges[:, :2]
    assert torch.allclose(sides, sides[0, 0].expand_as(sides))
    assert torch.equal(box_iou(edges, edges) > 0, torch.eye(number, dtype=torch.bool))


def test_each_ending_makes_a_prompt():
    found = layouts(LayoutSettings(endings=["at sea", "in the snow"]), ["<asset0>"])
    assert [layout.prompt for layout in found] == [
        "a photo of <asset0> at sea",
        "a photo of <asset0> in the snow",
    ]
    with pytest.raises(MifoError, match=r"layout\.endings"):
        layouts(LayoutSettings(endings=[]), ["<asset0>"])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"prompt": "a photo of {instance} at the beach"}, r"\{instance\}.*take \{instances\} or \{subset\}"),
        ({"endings": ["with {instances}"]}, r"layout\.endings=.*\{instances\}"),
        ({"prompt": "a photo of asset0"}, "write <asset0>"),
        ({"prompt": "a photo of <ASSET0>"}, "write <asset0>"),
        ({"endings": ["with asset0"]}, "write <asset0>"),
        ({"boxes": {"ASSET0": [0, 0, 1, 1]}}, "write <asset0>"),
    ],
)
def test_prompts_that_would_give_no_instance_are_refused(given, sentence):
    with pytest.raises(MifoError, match=sentence):
        layouts(LayoutSettings(**given), ["<asset0>"])


def test_prompts_run_over_the_power_set():
    tokens = ["<asset0>", "<asset1>", "<asset2>"]
    found = layouts(settings("run", "layout=power_set").layout, tokens)
    prompts = [each.prompt for each in found]
    assert len(prompts) == len(set(prompts)) == 7 * 10
    assert prompts[0] == "a photo of <asset0> at the beach"
    assert prompts[-1] == "a photo of <asset0> and <asset1> and <asset2> floating on top of water"
    assert all([*each.boxes] == re.findall("<asset[0-9]>", each.prompt) for each in found)
    given = LayoutSettings("{subset}", boxes={token: [0, 0, 0.5, 0.5] for token in tokens[:2]})
    assert [[*each.boxes] for each in layouts(given, tokens)] == [
        *([tokens[0]], [tokens[1]], []),
        *(tokens[:2], tokens[:1], tokens[1:2], tokens[:2]),
    ]


@pytest.mark.parametrize("task", ["learn", "run"])
def test_scores_while_learning_are_those_of_the_end(task):
    given = ["callbacks=evaluation", "metrics.fit=stretch", "guidance=masks", "synthesis.guidance_scale=3"]
    made = settings(task, *given)
    for recorded in (made, settings_of(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(made))))):
        callback = instantiate(recorded.callbacks["evaluation"])
        assert callback.metrics == made.metrics and callback.metrics.fit == "stretch"
        assert callback.make.keywords["guidance"] == made.guidance
        assert callback.make.keywords["settings"] == replace(made.synthesis, steps=20, samples=1)
    with pytest.raises(MifoError, match=r"callbacks\.evaluation scores pictures"):
        check(settings(task, "callbacks=evaluation", "metrics=none"))


def test_precision_is_the_profile_s():
    check(settings("learn", "performance=reference"))
    assert "precision" not in yaml.safe_load((conf_folder() / "trainer" / "gpu.yaml").read_text())["trainer"]
    with pytest.raises(MifoError, match=r"performance\.learning_precision"):
        check(settings("learn", "+trainer.precision=bf16-mixed"))
