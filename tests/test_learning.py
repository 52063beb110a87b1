"""Learning: what changes and what does not, golden losses, and a run that goes on where it was killed."""

import copy
import sys

import pandas
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import MPIEnvironment
from terms import penalty
from tiny import tiny_pipeline, two_instances

from mifo.backbones.learned import load_learned
from mifo.backbones.loading import load_model
from mifo.backbones.settings import ModelSettings
from mifo.data.settings import PriorSettings
from mifo.errors import MifoError
from mifo.training.fit import check_learning, learn
from mifo.training.settings import LearningSettings, StageSettings, adamw, adamw_8bit, constant

OPTIMIZERS = {"adamw": adamw, "adamw_8bit": adamw_8bit}

# total losses of the seeded run below: semantic learning, then fine-tuning; a change means another method
GOLDEN = [0.25575, 0.51935, 0.36755, 0.35373, 1.60331, 1.58172, 1.38053]
TRAINER = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture
def instances():
    return two_instances()


@pytest.fixture
def settings(tmp_path_factory):
    return LearningSettings(
        semantic=StageSettings(steps=4, checkpoint_every=2),
        finetuning=StageSettings(
            steps=3, trainable="full", learning_rate=1e-3, lr_scheduler=constant(), checkpoint_every=2
        ),
        prior=PriorSettings(pictures=2, steps=2, cache=str(tmp_path_factory.getbasetemp() / "prior")),
    )


class Watch(Callback):
    """Keeps what every step gave; raises at a chosen step of a chosen stage, as a killed run would end."""

    def __init__(self, kill=None):
        self.losses, self.parts, self.layers, self.kill = [], [], {}, kill

    def on_train_batch_end(self, trainer, module, *args):
        self.losses.append((module.stage, trainer.global_step, module.last.total.item()))
        self.parts.append((module.stage, module.last))
        self.layers[module.stage] = tuple(site.index for site in module.last.maps)
        if self.kill == (module.stage, trainer.global_step):
            raise RuntimeError("killed")


def rows_of(model):
    """The new rows of the one text encoder."""
    return model.new_rows["text_encoder"]


def weights(model):
    return {
        **{f"unet.{k}": v.clone() for k, v in model.unet.state_dict().items()},
        **{f"text.{k}": v.clone() for k, v in model.text_encoder.state_dict().items()},
    }


def test_semantic_learning_changes_the_new_rows_and_nothing_else(model, instances, settings, tmp_path):
    before = weights(model)
    table = model.text_encoder.get_input_embeddings().weight.clone()
    settings.finetuning.steps = 0
    learn(model, instances, settings, penalty(), tmp_path, trainer=TRAINER)
    embedding = model.text_encoder.get_input_embeddings()
    assert torch.equal(embedding.table.weight, table)
    car = model.tokenizer("car", add_special_tokens=False).input_ids
    assert (embedding.rows[0] - table[car].mean(0)).abs().max() > 1e-3
    after = weights(model)
    changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert not changed
    assert len(before.keys() & after.keys()) == len(before) - 1  # the table is renamed


def test_one_device_starts_no_mpi(model, instances, settings, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(MPIEnvironment, "detect", lambda: asked.append("mpi"))
    settings.semantic.steps, settings.finetuning.steps = 1, 0
    learn(model, instances, settings, penalty(), tmp_path, trainer=TRAINER)
    assert not asked


@pytest.mark.parametrize("several", [{"devices": 2}, {"devices": "auto"}, {"num_nodes": 2}])
def test_a_run_learns_on_one_device(model, instances, settings, tmp_path, several):
    with pytest.raises(MifoError, match=r"trainer\.devices and trainer\.num_nodes must be 1"):
        learn(model, instances, settings, penalty(), tmp_path, trainer=TRAINER | several)


def test_finetuning_changes_unet_and_text_encoder_but_no_known_word(model, instances, settings, tmp_path):
    before, table = weights(model), model.text_encoder.get_input_embeddings().weight.clone()
    settings.semantic.steps = 0
    learn(model, instances, settings, penalty(), tmp_path, trainer=TRAINER)
    after = weights(model)
    assert torch.equal(model.text_encoder.get_input_embeddings().table.weight, table)
    for part in ("unet.", "text."):
        names = [name for name in before if name.startswith(part) and name in after]
        changed = [name for name in names if not torch.equal(before[name], after[name])]
        assert len(changed) > 0.9 * len(names)


def test_same_seed_repeats_and_another_seed_differs(source, instances, settings, tmp_path):
    runs = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        watch = Watch()
        learn(
            load_model(ModelSettings("tiny", source)),
            instances,
            copy.deepcopy(settings),
            penalty(),
            tmp_path / name,
            seed=seed,
            trainer=TRAINER,
            callbacks=[watch],
        )
        runs.append(watch.losses)
    assert [entry[:2] for entry in runs[0]] == [("semantic", i) for i in (1, 2, 3, 4)] + [
        ("finetuning", i) for i in (1, 2, 3)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert [entry[2] for entry in runs[0]] == pytest.approx(GOLDEN, rel=1e-3)


@pytest.mark.parametrize(
    ("kill", "optimizer"),
    [
        (("semantic", 3), "adamw"),
        (("finetuning", 1), "adamw"),
        (("finetuning", 3), "adamw"),
        (("finetuning", 3), "adamw_8bit"),
    ],
)
def test_a_killed_run_goes_on_to_the_same_result(source, instances, settings, tmp_path, kill, optimizer):
    settings.finetuning.optimizer = OPTIMIZERS[optimizer]()

    def run(folder, watch):
        model = load_model(ModelSettings("tiny", source))
        options = {"seed": 1, "trainer": TRAINER, "callbacks": [watch]}
        learn(model, instances, settings, penalty(reward_steps=2), folder, **options)
        return weights(model)

    whole = run(tmp_path / "whole", Watch())
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", Watch(kill))
    again = Watch()
    resumed = run(tmp_path / "killed", again)
    assert len(again.losses) < 7
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (tmp_path / "killed" / "checkpoints").exists()


def sd_like(folder, prediction_type):
    """The four levels of Stable Diffusion (1.x for epsilon, 2.x for v), shrunk, in a pipeline folder."""
    tiny_pipeline(folder)
    second = prediction_type == "v_prediction"
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=(1, 2, 4, 4) if second else 2,
        use_linear_projection=second,
    )
    unet.save_pretrained(folder / "unet")
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", prediction_type=prediction_type)
    scheduler.save_pretrained(folder / "scheduler")
    return str(folder)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_both_stages_run_on_the_topology_of_stable_diffusion(instances, settings, tmp_path, prediction_type):
    source = sd_like(tmp_path / "pipeline", prediction_type)
    model = load_model(ModelSettings("sd", source))
    watch = Watch()
    losses = penalty(reward_steps=2, time_below=1.0)
    folder = learn(model, instances, settings, losses, tmp_path, trainer=TRAINER, callbacks=[watch])
    assert len(watch.losses) == 7 and all(torch.isfinite(torch.tensor(entry[2])) for entry in watch.losses)
    assert watch.layers == {"semantic": (15, 17, 19, 21, 23, 25), "finetuning": (9, 11, 15, 17, 19)}
    loaded = load_model(ModelSettings("sd", source))
    learned = load_learned(folder, loaded)
    assert learned.base["prediction_type"] == prediction_type and learned.stages == {
        "semantic": 4,
        "finetuning": 3,
    }
    learnt = weights(model)
    assert all(torch.equal(learnt[name], value) for name, value in weights(loaded).items())


@pytest.mark.parametrize(
    "change", ["lora", "cross_attention_kv", "no prior", "break_a_scene", "no attention loss", "two samples"]
)
def test_baselines_and_ablations_learn(source, model, instances, settings, tmp_path, change):
    losses = penalty(reward_steps=2, time_below=1.0)
    if change in ("lora", "cross_attention_kv"):
        if change == "lora":
            pytest.importorskip("peft")
        settings.finetuning.trainable = change
    elif change == "no prior":
        settings.prior.weight = 0.0
    elif change == "two samples":
        settings.semantic.batch_size = settings.finetuning.batch_size = 2
    elif change == "break_a_scene":
        losses.terms["penalty"].loss, losses.terms["penalty"].weight = "break_a_scene", 1e-2
    else:
        losses = penalty("none")
    watch = Watch()
    processors = dict(model.unet.attn_processors)
    folder = learn(model, instances, settings, losses, tmp_path, trainer=TRAINER, callbacks=[watch])
    parts = dict(watch.parts)
    assert (parts["finetuning"].prior == 0) == (change == "no prior")
    assert all((each.attention == 0) == (change == "no attention loss") for each in parts.values())
    if change not in ("lora", "cross_attention_kv"):
        assert dict(model.unet.attn_processors) == processors
    loaded = load_model(ModelSettings("tiny", source))
    load_learned(folder, loaded)
    assert torch.equal(rows_of(loaded), rows_of(model))
    before = load_model(ModelSettings("tiny", source)).unet.state_dict()
    moved = {
        name
        for name, value in model.unet.state_dict().items()
        if name in before and (value != before[name]).any()
    }
    if change == "lora":
        assert not moved
    elif change == "cross_attention_kv":
        assert moved and all(".attn2.to_k" in name or ".attn2.to_v" in name for name in moved)


def test_a_frozen_base_model_may_be_in_half_precision(source, instances, settings, tmp_path):
    pytest.importorskip("peft")
    model = load_model(ModelSettings("tiny", source, dtype="bfloat16"))
    with pytest.raises(MifoError, match=r"trainable=full needs model\.dtype=float32"):
        learn(model, instances, settings, penalty(), tmp_path, trainer=TRAINER)
    settings.finetuning.trainable = "lora"
    with pytest.raises(MifoError, match=r"performance\.learning_precision=bfloat16"):
        learn(model, instances, settings, penalty(), tmp_path, trainer=TRAINER)
    watch, trainer = Watch(), TRAINER | {"precision": "bf16-mixed"}
    learn(model, instances, settings, penalty(), tmp_path, trainer=trainer, callbacks=[watch])
    whole = Watch()
    full = load_model(ModelSettings("tiny", source))
    learn(full, instances, settings, penalty(), tmp_path / "full", trainer=TRAINER, callbacks=[whole])
    assert [entry[2] for entry in watch.losses] == pytest.approx(
        [entry[2] for entry in whole.losses], rel=0.05
    )
    assert rows_of(model).dtype == torch.float32


class LargestGradient(Callback):
    """Keeps the norm of the gradients as the optimiser leaves them, after each of its steps."""

    def __init__(self):
        self.norms = []

    def on_train_start(self, trainer, module):
        def keep(*_):
            self.norms.append(torch.nn.utils.get_total_norm([rows_of(module.model).grad]).item())

        trainer.optimizers[0].register_step_post_hook(keep)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_gradients_are_clipped_to_their_norm(source, instances, settings, tmp_path, optimizer):
    settings.finetuning.steps, settings.semantic.optimizer = 0, OPTIMIZERS[optimizer]()
    norms, rows = {}, {}
    for limit in (0.0, 1e-3, 1e3):
        settings.semantic.gradient_clip = limit
        model, watch = load_model(ModelSettings("tiny", source)), LargestGradient()
        options = {"trainer": TRAINER, "callbacks": [watch]}
        learn(model, instances, copy.deepcopy(settings), penalty(), tmp_path / str(limit), **options)
        norms[limit], rows[limit] = watch.norms, rows_of(model).detach().clone()
    assert min(norms[0.0]) > 2e-3 and norms[1e3] == norms[0.0]
    if optimizer == "adamw":  # which writes the divided gradients back
        assert norms[1e-3] == pytest.approx([1e-3] * 4, rel=2e-3)
    assert torch.equal(rows[1e3], rows[0.0]) and not torch.equal(rows[1e-3], rows[0.0])


def test_losses_reach_the_logger_at_its_interval(model, instances, settings, tmp_path):
    logger = CSVLogger(tmp_path / "log", name="", version="")
    options = {"trainer": TRAINER | {"log_every_n_steps": 2}, "loggers": [logger]}
    learn(model, instances, settings, penalty(), tmp_path, **options)
    rows = pandas.read_csv(tmp_path / "log" / "metrics.csv")
    assert rows["semantic/loss/total"].count() == 2 and rows["finetuning/loss/total"].count() == 1
    parts = (
        rows[[f"finetuning/loss/{part}" for part in ("denoising", "prior", "attention")]].dropna().sum(axis=1)
    )
    assert parts.tolist() == pytest.approx(rows["finetuning/loss/total"].dropna().tolist(), rel=1e-5)


def test_a_result_is_never_replaced(model, instances, settings, tmp_path):
    (tmp_path / "learned").mkdir()
    with pytest.raises(MifoError, match="exists already"):
        learn(model, instances, settings, penalty(), tmp_path, trainer=TRAINER)
    assert not list((tmp_path / "learned").iterdir())


@pytest.mark.parametrize(
    ("part", "key", "value", "sentence"),
    [
        ("finetuning", "trainable", "everything", "learning.finetuning.trainable=everything"),
        ("semantic", "steps", -1, "at least 0"),
        ("semantic", "trainable", "full", "must be tokens"),
        ("prior", "weight", -1.0, "learning.prior.weight"),
        ("prior", "pictures", 0, "learning.prior.pictures"),
    ],
)
def test_impossible_settings_are_refused(settings, part, key, value, sentence):
    setattr(getattr(settings, part), key, value)
    with pytest.raises(MifoError, match=sentence):
        check_learning(settings)


@pytest.mark.parametrize(
    "template", ["a photo", "{} and {}", "{} by <asset1>", "{instances}", "{1}", "{", ""]
)
def test_a_template_names_the_instances_once(settings, template):
    settings.template = template
    with pytest.raises(MifoError, match=r"learning\.template=.*use \{\} once"):
        check_learning(settings)
    settings.template = "{}, a photo"
    check_learning(settings)


def test_what_would_end_learning_midway_is_refused_before_a_model_is_loaded(
    mifo, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("mifo.commands.learn.load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    (tmp_path / "empty").mkdir()
    for argument, words in (
        ("learning.prior.folder=nowhere", "learning.prior.folder=nowhere is not a folder"),
        ("learning.prior.folder=empty", "learning.prior.folder=empty holds no picture"),
        ("learning.finetuning.trainable=lora", "pip install 'mifo[low_vram]'"),
        ("performance=low_vram", "pip install 'mifo[low_vram]'"),
        ("learning.template=a photo", "learning.template='a photo'"),
        ("instances.initializers=[car,'',car]", "instances.initializers holds an empty word"),
    ):
        for task in ("learn", "run"):
            assert mifo(task, argument) == 2
            told = capsys.readouterr().err.strip()
            assert told.startswith("mifo: error: ") and len(told.splitlines()) == 1
            assert words in told


def test_what_learning_does_not_need_is_not_asked_for(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    settings.prior.folder = "nowhere"
    with pytest.raises(MifoError, match="nowhere is not a folder"):
        check_learning(settings)
    settings.prior.weight = 0.0
    check_learning(settings)
    settings.prior.weight, settings.finetuning.steps = 1.0, 0
    settings.finetuning.trainable = "lora"
    check_learning(settings)


def test_what_learning_fixes_can_not_be_set_for_the_trainer(model, instances, settings, tmp_path):
    with pytest.raises(MifoError, match=r"trainer\.max_steps is fixed"):
        learn(model, instances, settings, penalty(), tmp_path, trainer=TRAINER | {"max_steps": 3})
