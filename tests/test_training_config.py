"""Optimisers, LR schedulers and the trainer by `_target_`; keys and results of earlier versions."""

import re
from pathlib import Path

import pytest
import torch
from lightning import Callback
from omegaconf import OmegaConf
from tiny import tiny_pipeline, two_instances

from mifo.backbones.learned import load_learned
from mifo.backbones.loading import load_model
from mifo.backbones.settings import ModelSettings
from mifo.benchmark import rows
from mifo.commands.benchmark import benchmark
from mifo.config.checks import check
from mifo.config.compose import REFUSALS, compose, explain, settings_of
from mifo.config.location import conf_folder
from mifo.config.renamed import RENAMED
from mifo.config.resume import resume
from mifo.data.settings import PriorSettings
from mifo.errors import MifoError
from mifo.files import read_json
from mifo.method.losses.settings import PenaltySettings, Ramp, TermSettings
from mifo.method.losses.timeline import Timeline
from mifo.tensors import read_tensors
from mifo.training.fit import learn
from mifo.training.settings import (
    LearningSettings,
    StageSettings,
    adamw,
    adamw_8bit,
    constant,
    cosine_with_restarts,
)

OLD = Path(__file__).parent / "old"
OPTIMIZER, SCHEDULER = "learning.semantic.optimizer", "learning.semantic.lr_scheduler"
TORCHS = f"{SCHEDULER}._target_=torch.optim.lr_scheduler"


def learning(*overrides):
    """The checked settings of `mifo learn`."""
    settings = settings_of(compose("learn", ["paths.output=unused", *overrides]))
    check(settings)
    return settings


def refusal(*overrides):
    with pytest.raises((MifoError, *REFUSALS)) as caught:
        learning(*overrides)
    return explain(caught.value, "learn")


class Watch(Callback):
    """What each step was taken with."""

    def __init__(self):
        self.rates, self.norms, self.losses = [], [], []

    def on_train_batch_start(self, trainer, module, *args):
        self.optimizer = module.optimizers(use_pl_optimizer=False)
        self.rates.append(self.optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, *args):
        self.losses.append(
            {name: getattr(module.last, name).item() for name in ("total", "denoising", "attention")}
        )
        self.norms.append(module.gradient_norm.item())


def learnt(source, folder, stage, penalty=None, **options):
    """Watch a semantic stage of these settings."""
    settings = LearningSettings(
        semantic=stage, finetuning=StageSettings(steps=0), prior=PriorSettings(weight=0)
    )
    watch = Watch()
    learn(
        load_model(ModelSettings("tiny", source)),
        two_instances(),
        settings,
        penalty or PenaltySettings(),
        folder,
        trainer={"accelerator": "cpu", "enable_progress_bar": False},
        callbacks=[watch],
        **options,
    )
    return watch


def test_the_options_are_the_defaults_of_the_code():
    for option, node in {
        "optimizer/adamw": adamw(),
        "optimizer/adamw_8bit": adamw_8bit(),
        "lr_scheduler/constant": constant(),
        "lr_scheduler/cosine_with_restarts": cosine_with_restarts(),
    }.items():
        assert OmegaConf.load(conf_folder() / f"{option}.yaml") == node


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([f"optimizer@{OPTIMIZER}=prodigy"], "needs the package prodigyopt, which is not installed"),
        ([f"optimizer@{OPTIMIZER}=bitsandbytes_8bit"], "with: pip install bitsandbytes"),
        ([f"optimizer@{OPTIMIZER}=adam"], "did you mean adamw?"),
        ([f"{OPTIMIZER}=adamw"], f"choose one by optimizer@{OPTIMIZER}=OPTION of adamw, adamw_8bit"),
        ([f"{OPTIMIZER}._target_=torch.optim.Adamx"], "did you mean torch.optim.Adam"),
        ([f"{OPTIMIZER}._target_=torch.nn.Linear"], "does not take its arguments"),
        (
            [f"+{OPTIMIZER}.wieght_decay=0"],
            f"{OPTIMIZER}.wieght_decay is no argument of torch.optim.AdamW; did",
        ),
        ([f"{TORCHS}.CosineAnnealingLR"], "'T_max'"),
        ([f"{TORCHS}.ReduceLROnPlateau"], "counts steps alone"),
        (["learning.semantic.lr_warmup_steps=-1"], "lr_warmup_steps=-1 is too small; take at least 0"),
        (
            ["+trainer.acelerator=cpu"],
            "trainer.acelerator is no argument of lightning.Trainer; did you mean acc",
        ),
        (["+trainer.max_steps=3"], "trainer.max_steps is fixed by learning"),
        (["trainer._target_=lightning.Trainerr"], "did you mean lightning.Trainer?"),
        (["trainer={_target_: torch.nn.ReLU}"], "is no argument of torch.nn.ReLU"),
        (["callbacks=samples", "+callbacks.samples.evry=3"], "did you mean every?"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_configuration(overrides, told):
    assert told in refusal(*overrides)


@pytest.mark.parametrize("key", RENAMED)
def test_old_keys_are_refused_by_their_new_names(key):
    assert RENAMED[key] in refusal(f"{key}=x")


def test_what_is_named_by_a_configuration_learns(source, tmp_path):
    settings = learning(
        *(f"{OPTIMIZER}._target_=torch.optim.SGD", f"+{OPTIMIZER}.momentum=0.9"),
        *(f"{TORCHS}.LinearLR", f"+{SCHEDULER}.total_iters=4", "learning.semantic.learning_rate=1e-3"),
    ).learning.semantic
    settings.steps = 3
    watch = learnt(source, tmp_path, settings)
    assert watch.optimizer.defaults["momentum"] == 0.9 and watch.optimizer.defaults["weight_decay"] == 1e-2
    assert watch.rates == pytest.approx([1e-3 / 3, 1e-3 / 2, 1e-3 * 2 / 3])


def test_an_optimiser_of_another_package_gets_the_keys_and_clipped_gradients(source, tmp_path, monkeypatch):
    """It neither runs as one kernel nor divides gradients itself."""
    (tmp_path / "prodigyopt.py").write_text(
        "import torch\n"
        "class Prodigy(torch.optim.AdamW):\n"
        "    norms = []\n"
        "    def __init__(self, params, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, d0=1e-6):\n"
        "        super().__init__(params, lr=lr * d0, betas=betas, eps=eps, weight_decay=weight_decay)\n"
        "    def step(self, closure):\n"
        "        closure()\n"
        "        gradients = [each.grad.flatten() for each in self.param_groups[0]['params']]\n"
        "        self.norms.append(torch.cat(gradients).norm().item())\n"
        "        return super().step()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = learning(f"optimizer@{OPTIMIZER}=prodigy").learning.semantic
    settings.steps, settings.gradient_clip, settings.lr_scheduler = 2, 1e-4, constant()
    watch = learnt(source, tmp_path / "run", settings)
    assert watch.optimizer.norms == pytest.approx([1e-4, 1e-4], rel=1e-3) and min(watch.norms) > 1e-3
    assert watch.rates == [1e-6, 1e-6] and watch.optimizer.defaults["betas"] == (0.9, 0.99)


def test_a_ramp_is_followed_without_capturing_anew(source, tmp_path, recordings):
    from mifo.acceleration.settings import PerformanceSettings

    ramp = TermSettings("penalty", 0.0, ramp=Ramp.linear, weight_end=8.0)
    stage = StageSettings(steps=5, learning_rate=0.0, lr_scheduler=constant())
    performance = PerformanceSettings("graphs", learning_precision="float32", cuda_graphs=True)
    watch = learnt(source, tmp_path / "ramp", stage, PenaltySettings({"p": ramp}), performance=performance)
    assert recordings.count == 1
    # the same draws and weights of the model, but another weight of the term
    one = PenaltySettings({"p": TermSettings("penalty", 1.0)})
    plain = learnt(source, tmp_path / "one", stage, one)
    weighted = [loss["attention"] for loss in watch.losses]
    unweighted = [loss["attention"] for loss in plain.losses]
    assert min(unweighted) > 0
    assert weighted == pytest.approx(
        [w * each for w, each in zip((0, 2, 4, 6, 8), unweighted, strict=True)], rel=1e-4
    )
    assert watch.losses[4]["total"] > watch.losses[4]["denoising"]


def test_several_terms_and_their_sites_from_the_command_line(source):
    model = load_model(ModelSettings("tiny", source))
    words = [site for site in model.sites if site.kind == "words"]
    penalty = learning(
        "+penalty.terms.wide={loss: reward, weight: 0.5, sites: ['8']}",
        f"+penalty.terms.named={{loss: penalty, weight: 1, sites: [{words[0].name}]}}",
        "penalty.terms.reward.weight=3",
    ).penalty
    timeline = Timeline(penalty, "semantic", 300, model)
    active = {term.name: term for term in timeline.active(0)}
    assert {*active} == {"reward", "wide", "named"} and timeline.weight(active["reward"], 0) == 3
    assert active["wide"].sites == tuple(site for site in words if site.size == (8, 8)) != ()
    assert active["named"].sites == (words[0],)
    assert {term.name for term in timeline.active(299)} == {"penalty", "wide", "named"}


def test_a_learned_result_of_before_loads(tmp_path):
    """Made by the code of 26 November 2026 with `learning.finetuning.learn=kv` on this pipeline."""
    model = load_model(ModelSettings("tiny", str(tiny_pipeline(tmp_path))))
    learned = load_learned(OLD / "learned", model)
    assert learned.trainable == "cross_attention_kv" and learned.tokens == [
        "<asset0>",
        "<asset1>",
        "<asset2>",
    ]
    rows = read_tensors(OLD / "learned" / "tokens.safetensors", {"rows": (3, 16)})["rows"]
    assert torch.equal(model.new_rows["text_encoder"].detach(), rows)
    (parts,) = [each for each in model.trainable("cross_attention_kv").values() if each]
    shapes = {name: each.shape for name, each in parts.items()}
    for name, tensor in read_tensors(OLD / "learned" / "unet.safetensors", shapes).items():
        assert torch.equal(parts[name], tensor)


def test_a_run_of_an_earlier_version_is_not_gone_on_with(tmp_path):
    (tmp_path / "config.yaml").write_text((OLD / "config.yaml").read_text())
    with pytest.raises(
        MifoError, match=rf"{re.escape(str(tmp_path))}/config.yaml .*another version.*new run$"
    ):
        resume("learn", tmp_path, [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{OPTIMIZER}._target_", "os.system"),
        (f"{SCHEDULER}._target_", "os.system"),
        ("trainer._target_", "os.system"),
        ("penalty.terms.reward.loss", "somebody.Loss"),
    ],
)
def test_a_folder_does_not_choose_code(tmp_path, key, value):
    content = OmegaConf.structured(settings_of(compose("learn", [f"paths.output={tmp_path}"])))
    content = OmegaConf.create(OmegaConf.to_container(content, enum_to_str=True))
    OmegaConf.update(content, key, value)
    OmegaConf.save(content, tmp_path / "config.yaml")
    with pytest.raises(MifoError, match=rf"has {re.escape(key)}={value}, which a folder may not choose"):
        resume("learn", tmp_path, [])


def test_the_prompt_of_pictures_while_learning_is_refused_before_a_model_is_loaded(mifo, capsys, monkeypatch):
    monkeypatch.setattr("mifo.commands.learn.load_model", lambda *args: pytest.fail("a model was loaded"))
    prompt = "callbacks.samples.layout.prompt='a photo of {subject}'"
    assert mifo("learn", "callbacks=samples", "logger=none", prompt) == 2
    assert "callbacks.samples does not take its arguments: layout.prompt" in capsys.readouterr().err


def test_optimisers_are_timed_beside_each_other(source, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "random_model", lambda *args: load_model(ModelSettings("tiny", source)))
    monkeypatch.setitem(rows.OPTIMIZERS, "bitsandbytes_8bit", {"_target_": "not_installed.AdamW8bit"})
    overrides = [
        *(
            f"paths.output={tmp_path}",
            "device=cpu",
            "benchmark.shapes=miniature",
            "benchmark.rows=[optimizers]",
        ),
        *("benchmark.steps=2", "benchmark.warmup=1", "benchmark.instances=2", "learning.prior.pictures=1"),
        "learning.finetuning.learning_rate=1e-3",
    ]
    record = benchmark(settings_of(compose("benchmark", overrides)))
    notes = read_json(record)["rows"]["optimizers"]["notes"]
    assert notes["adamw, seconds"] > 0 and notes["adamw_8bit, GiB"] > 0
    assert notes["adamw, largest relative difference from adamw"] == 0
    assert 0 < notes["adamw_8bit, largest relative difference from adamw"] < 0.1
    assert "pip install not_installed" in notes["bitsandbytes_8bit"]
