"""Every experiment and method composes and runs dry; so does what the pages tell one to type."""

import re
import shlex
from pathlib import Path

import hydra
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from tiny import tiny_pipeline
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args, load_sweep_config

from mifo.commands.results import _FILTER
from mifo.commands.run import run
from mifo.config.checks import check
from mifo.config.compose import compose, settings_of
from mifo.config.launch import launcher
from mifo.config.location import conf_folder
from mifo.metrics.evaluation import METRICS
from mifo.tables.settings import read_table
from mifo.tables.tuning import read_tuning

ROOT = Path(__file__).parents[1]
COMMANDS = [
    line.partition("#")[0].strip()
    for page in ("sweeps", "questions", "photo")
    for line in (ROOT / f"docs/{page}.md").read_text().splitlines()
    if line.startswith("mifo ") and "…" not in line
]
PLUGINS = {
    "hydra/launcher=joblib": "joblib_launcher",
    "hydra/launcher=gpus": "joblib_launcher",
    "hydra/launcher=ray": "ray_launcher",
    "hydra/launcher=submitit": "submitit_launcher",
    "hparams_search=": "optuna_sweeper",
}
"""What an override needs to be composed."""


def options(group):
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.mark.parametrize(
    "override", [f"{group}={o}" for group in ("experiment", "method") for o in options(group)]
)
def test_it_runs_dry(override, source, tmp_path):
    tiny = [
        "model=local",
        f"model.source={source}",
        "debug=fast_dev_run",
        "metrics=none",
        "logger=none",
        "device=cpu",
    ]
    settings = settings_of(compose("run", [override, *tiny, f"paths.output={tmp_path / 'run'}"]))
    check(settings)
    assert (run(settings) / "contact_sheet.png").is_file()


def need_plugins(text):
    for part, plugin in PLUGINS.items():
        if part in text:
            pytest.importorskip(f"hydra_plugins.hydra_{plugin}")


def composed(task, overrides):
    """The settings of a job, and Hydra's own part of its configuration."""
    overrides = [*overrides, "paths.output=here"]
    settings = settings_of(compose(task, overrides))
    check(settings)
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return settings, hydra.compose(task, overrides, return_hydra_config=True).hydra


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_pages_say_composes(command):
    need_plugins(command)
    _, task, *typed = shlex.split(command)
    if task in ("table", "tune"):
        own = [text for text in typed if text.startswith("hydra")]
        launcher("no.function", own, ROOT)
        if task == "tune":
            pytest.importorskip("optuna", reason="tuning needs the extra optuna")
        read = read_table if task == "table" else read_tuning
        read(ROOT / typed[0], [text for text in typed[1:] if text not in own])
        return
    if task == "results":  # which is no Hydra application
        assert typed[0] in ("diff", "show") or all(
            map(_FILTER.fullmatch, " ".join(typed).partition(" > ")[0].split())
        )
        return
    overrides = OverridesParser.create().parse_overrides([each for each in typed if each != "-m"])
    jobs = BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
    for job in [jobs[0], *jobs[1:][-1:]]:
        if "hydra/launcher" in command:
            OmegaConf.to_container(composed(task, job)[1].launcher, throw_on_missing=True)
        else:
            check(settings_of(compose(task, [*job, "paths.output=here"])))


@pytest.mark.parametrize("search", options("hparams_search"))
def test_a_search_varies_keys_that_exist_and_knows_which_way_is_better(search):
    need_plugins("hparams_search=")
    settings, own = composed("run", [f"hparams_search={search}"])
    varied = [f"{key}=0.0123" for key in own.sweeper.params]
    changed, _ = composed("run", [f"hparams_search={search}", *varied])
    assert varied and changed.penalty.finetuning.weight == 0.0123 != settings.penalty.finetuning.weight
    direction = own.sweeper.direction
    directions = [direction] if isinstance(direction, str) else list(direction)
    better = ["maximize" if METRICS[name].higher_is_better else "minimize" for name in settings.objectives]
    assert directions == better


def test_the_weights_and_biases_sweep_starts_runs_of_keys_that_exist():
    path = ROOT / "experiments/loss_weights/wandb_sweep.yaml"
    asked = load_sweep_config(str(path))
    ends = [
        {name: {"value": each[end]} for name, each in asked["parameters"].items()} for end in ("min", "max")
    ]
    for values in ends:
        typed = create_sweep_command_args({"args": values})["args_no_hyphens"]
        given = [part for part in asked["command"] if not re.fullmatch(r"\$\{\w+\}", part)]
        assert given[:2] == ["mifo", "run"] and asked["command"][-1] == "${args_no_hyphens}"
        penalty = composed("run", [*given[2:], *typed])[0].penalty
        terms = {name: term.weight for name, term in penalty.terms.items()}
        weight = values["penalty.terms.penalty.weight"]["value"]
        reward = values["penalty.reward_weight"]["value"]
        assert terms == {"reward": reward, "penalty": weight, "finetuning": weight}
    metric, summary = asked["metric"]["name"].removeprefix("evaluation/").split(".")
    goal = "maximize" if METRICS[metric].higher_is_better else "minimize"
    assert (asked["metric"]["goal"], summary) == (goal, goal.removesuffix("imize"))


METHODS = ["mifo", "break_a_scene", "custom_diffusion", "masked_dreambooth", "masked_textual_inversion"]


def stages(settings):
    learning = settings.learning
    return [stage for stage in (learning.semantic, learning.finetuning) if stage.steps]


@pytest.mark.parametrize("method", METHODS)
def test_on_the_miniature_every_method_takes_as_many_steps(method):
    mine, other = (
        settings_of(compose("run", [f"method={name}", "paths.output=here"])) for name in ("mifo", method)
    )
    assert sum(stage.steps for stage in stages(mine)) == sum(stage.steps for stage in stages(other))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["sd21", "local"])
def test_the_page_on_methods_says_what_is_set(method, model):
    given = [f"method={method}", f"model={model}", "model.source=folder", "paths.output=here"]
    settings = settings_of(compose("run", given))
    row = next(
        line for line in (ROOT / "docs/methods.md").read_text().splitlines() if f"| `{method}`" in line
    )
    steps, rates, prior = (row.split("|")[column].strip() for column in (3, 4, 6))
    said, batch = steps.split(", ")
    assert [int(each) for each in said.split(" + ")] == [stage.steps for stage in stages(settings)]
    assert {int(batch)} == {stage.batch_size for stage in stages(settings)}
    assert [float(each.split(",")[0]) for each in rates.split("; ")] == [
        stage.learning_rate for stage in stages(settings)
    ]
    if prior != "none":
        assert (
            int(prior.split()[0]) == settings.learning.prior.pictures and settings.learning.prior.weight == 1
        )
    below = {term.time_below for term in settings.penalty.terms.values()}
    assert below == ({1.0} if method == "break_a_scene" else {0.5} if method == "mifo" else set())
