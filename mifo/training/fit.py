"""Learning from first to last: new tokens, both stages, the folder `learned/`."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import SingleDeviceStrategy

from mifo.acceleration.profile import PRECISIONS, available, ready_for_learning
from mifo.acceleration.settings import PerformanceSettings
from mifo.backbones.learned import save_learned
from mifo.backbones.model import DiffusionModel, Trainable
from mifo.data.class_pictures import class_prompts, own_picture_files
from mifo.data.instances import InstanceSet
from mifo.data.learning_data import LearningData
from mifo.errors import MifoError, check_known, check_least, check_package
from mifo.files import check_room, reason, refuse_existing, remove
from mifo.making.class_pictures import check_cache, class_pictures
from mifo.method.backbone import Stage
from mifo.method.losses.settings import PenaltySettings
from mifo.method.prompts.instances import INSTANCE, check_placeholders
from mifo.training.checkpoints import (
    NEWEST,
    SaveCheckpoints,
    WholeCheckpoints,
    newest_checkpoint,
    refusing_odd,
)
from mifo.training.finite import FiniteNumbers
from mifo.training.self_check import AttentionCheck
from mifo.training.settings import LearningSettings, StageSettings
from mifo.training.stages import LearningStage
from mifo.training.targets import check_optimizer, make, target

CHECKPOINTS = "checkpoints"  # the folder in a run's folder; it goes when the result is saved
TRAINER = {"_target_": "lightning.Trainer", "devices": 1}
# arguments of the trainer that learning decides
FIXED = "max_steps max_epochs default_root_dir enable_checkpointing logger plugins callbacks".split()


def check_learning(settings: LearningSettings) -> None:
    """Refuse impossible settings before any model is loaded."""
    for name, stage, _ in settings.stages:
        key = f"learning.{name}"
        check_known(f"{key}.trainable", stage.trainable, get_args(Trainable))
        check_least(key, stage, steps=0, batch_size=1, checkpoint_every=0, lr_warmup_steps=0)
        check_least(key, stage, learning_rate=0, weight_decay=0, eps=0, gradient_clip=0)
        if len(stage.betas) != 2 or not all(0 <= beta < 1 for beta in stage.betas):
            raise MifoError(f"{key}.betas={list(stage.betas)} must be two numbers from 0 to less than 1.")
        if stage.trainable == "lora":
            check_least(key, stage, lora_rank=1)
        if stage.steps:
            check_optimizer(name, stage)
    if settings.semantic.trainable != "tokens":
        raise MifoError("learning.semantic.trainable must be tokens: the first stage learns words alone.")
    if settings.finetuning.steps and settings.finetuning.trainable == "lora":
        check_package("learning.finetuning.trainable=lora", "peft", "low_vram")
    if not _names_instances_once(settings.template):
        raise MifoError(
            f"learning.template={settings.template!r} must name the instances once; use {{}} once: "
            "'a photo of {}'."
        )
    if not 0 <= settings.flip_probability <= 1:
        raise MifoError(f"learning.flip_probability={settings.flip_probability} is not between 0 and 1.")
    prior = settings.prior
    check_least("learning.prior", prior, weight=0, guidance_scale=0)
    if prior.batch_size is not None:
        check_least("learning.prior", prior, batch_size=1)
    if prior.weight and not prior.folder and prior.pictures < 1:
        raise MifoError("learning.prior.pictures must be at least 1; learning.prior.weight=0 needs none.")
    if prior.weight and not prior.prompts:
        raise MifoError("learning.prior.prompts is empty; give a prompt, such as a photo of {class}.")
    for prompt in prior.prompts:
        check_placeholders("learning.prior.prompts", prompt, ("class",))
    if settings.has_prior and prior.folder is not None:
        own_picture_files(prior.folder)


def check_trainer(arguments: Mapping[str, Any]) -> None:
    """Refuse a target that is no trainer, and arguments that it does not take or that learning decides."""
    for name in FIXED:
        if name in arguments:
            raise MifoError(f"trainer.{name} is fixed by learning and callbacks; take it out of trainer.")
    wanted = {**TRAINER, **arguments}
    # each process would make a folder of its own, and draw the same
    if str(wanted["devices"]) not in ("1", "[0]") or wanted.get("num_nodes", 1) != 1:
        raise MifoError(
            "trainer.devices and trainer.num_nodes must be 1, since a run learns on one device; start "
            "several runs by hydra/launcher=gpus for several GPUs, and choose one by CUDA_VISIBLE_DEVICES=N"
        )
    found = target("trainer", wanted)
    if not (isinstance(found, type) and issubclass(found, lightning.Trainer)):
        raise MifoError(f"trainer._target_={wanted['_target_']} is no Trainer of Lightning; name one")


def _names_instances_once(template: str) -> bool:
    try:
        return INSTANCE.findall(template.format("<asset0>")) == ["<asset0>"]
    except (AttributeError, LookupError, TypeError, ValueError):  # another placeholder than {}, a lone brace
        return False


def learn(
    model: DiffusionModel,
    instances: InstanceSet,
    settings: LearningSettings,
    penalty: PenaltySettings,
    folder: Path | str,
    *,
    seed: int = 0,
    trainer: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    config: str = "",
    performance: PerformanceSettings | None = None,
) -> Path:
    """Learn the instances with both stages and save them into `folder/learned`.

    Called again with the same arguments and `folder` after an interruption, it continues from the last
    checkpoint and ends with the same result as without. The checkpoints go when the result is saved; where
    `folder` can not take the result, it goes to a temporary folder.

    Args:
        model: a base model without new tokens; afterwards what was learned is in it, on the trainer's device.
        trainer: arguments of `lightning.Trainer` that the settings do not fix, as accelerator, precision.
        config: YAML text of the run's configuration, saved beside the result.
        performance: how the hardware is used; None: as Lightning and PyTorch do by themselves.

    Returns:
        `folder/learned`.

    Raises:
        MifoError: impossible settings, half-precision weights that can not learn, `folder/learned` exists,
            too little room on the disk, a damaged checkpoint, or a loss, gradient or weight that is not
            finite.
    """
    check_learning(settings)
    trainer, graphs, passes_in = dict(trainer or {}), False, None
    if performance is not None:
        check_float8(settings, performance)
        performance = available(performance, model.device, model.dtype)
        graphs = performance.cuda_graphs
        if not performance.autocast and performance.learning_precision == "bfloat16":
            passes_in = torch.bfloat16
        trainer.setdefault(
            "precision", PRECISIONS["float32" if passes_in else performance.learning_precision]
        )
        ready_for_learning(model, performance)
    check_trainer(trainer)
    _check_precision(model, settings, trainer)
    learned, checkpoints = Path(folder) / "learned", Path(folder) / CHECKPOINTS
    refuse_existing(learned)
    # files that killed runs left unfinished
    for rest in (*Path(folder).glob(".learned*"), *checkpoints.glob("*/.*.unfinished")):
        remove(rest)
    prompts: list[str] = []
    if settings.has_prior:
        prompts = class_prompts(instances, settings.prior)
        check_cache(model, prompts, settings.prior, seed)
    lightning.seed_everything(seed, verbose=False)
    model.add_words(instances.tokens, instances.initializers, seed)
    stages = settings.stages
    steps: dict[str, int] = {}
    for stream, (name, stage, prior_weight) in enumerate(stages):
        if not stage.steps:
            continue
        runner = _trainer(name, stage, checkpoints, trainer, callbacks, loggers)
        model.to(runner.strategy.root_device)
        if stage.trainable == "lora":
            model.add_lora(stage.lora_rank)
        check_room(Path(folder), room(model, stages[stream:], checkpoints, settings.save_half))
        module = LearningStage(name, model, instances, stage, penalty, prior_weight, graphs, passes_in)
        prior = None
        if prior_weight:
            prior = partial(class_pictures, model, prompts, settings.prior, seed, performance)
        sizes = {site.size for site in module.timeline.sites}
        data = LearningData(
            model, instances, settings, stage.steps, stage.batch_size, sizes, seed, stream, prior, performance
        )
        last = newest_checkpoint(checkpoints / name)
        try:
            with refusing_odd(last):
                runner.fit(module, data, ckpt_path=last, weights_only=True)
        finally:
            module.release()
        steps[name] = runner.global_step
    save = partial(
        save_learned,
        model=model,
        class_names=instances.class_names,
        initializers=instances.initializers,
        stages=steps,
        trainable=cast(Trainable, settings.finetuning.trainable if settings.finetuning.steps else "tokens"),
        lora_rank=settings.finetuning.lora_rank,
        half=settings.save_half,
        config=config,
    )
    _save(save, learned)
    model.freeze()
    remove_checkpoints(Path(folder))
    return learned


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of the run in `folder`, whose result is saved."""
    remove(folder / CHECKPOINTS)


def room(
    model: DiffusionModel, stages: Sequence[tuple[Stage, StageSettings, float]], checkpoints: Path, half: bool
) -> int:
    """Bytes that the checkpoints of these stages and the result will take; adapters count once they exist."""
    total = 2**20  # of small files
    for name, stage, _ in stages:
        parts = model.trainable(cast(Trainable, stage.trainable)).values() if stage.steps else ()
        learning = [*model.new_rows.values(), *(each for part in parts for each in part.values())]
        numbers = sum(each.numel() for each in learning)
        result = numbers * 2 if half else sum(each.numel() * each.element_size() for each in learning)
        if stage.steps and stage.checkpoint_every:
            states = stage.state_bytes * numbers
            kept = 1 if stage.checkpoint_every >= stage.steps else 2
            there = sum(file.stat().st_size for file in (checkpoints / name).glob("*.ckpt"))
            total += max(0, int(kept * (numbers * 4 + states)) - there)
    return total + result


def _save(save: Callable[[Path], Any], learned: Path) -> None:
    """Save the result; if that fails, save it in a temporary folder and say where, in a `MifoError`."""
    try:
        save(learned)
    except OSError as error:
        found = f"{learned} cannot be written ({reason(error)}); make room and "
        again = f"go on with resume={learned.parent}"
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix="mifo-")) / learned.name
            save(elsewhere)
        except OSError:
            raise MifoError(f"{found}{again}, from the last checkpoint") from error
        raise MifoError(f"{found}move what was learned there from {elsewhere}, before you {again}") from error


def _check_precision(model: DiffusionModel, settings: LearningSettings, trainer: Mapping[str, Any]) -> None:
    if model.dtype == torch.float32:
        return
    if settings.finetuning.steps and settings.finetuning.trainable not in ("tokens", "lora"):
        raise MifoError(
            f"learning.finetuning.trainable={settings.finetuning.trainable} needs model.dtype=float32, since "
            "small updates are lost in half precision; take that, or trainable=lora."
        )
    if "mixed" not in str(trainer.get("precision", "")):
        raise MifoError(
            "model.dtype in half precision needs performance.learning_precision=bfloat16 (or float16) to "
            "learn."
        )


def check_float8(settings: LearningSettings, performance: PerformanceSettings) -> None:
    """Refuse to learn weights that `performance.float8` would keep in 8 bits."""
    finetuning = settings.finetuning
    if performance.float8 and finetuning.steps and finetuning.trainable not in ("tokens", "lora"):
        raise MifoError(
            f"learning.finetuning.trainable={finetuning.trainable} learns weights that performance.float8 "
            "keeps in 8 bits; take trainable=lora, or performance.float8=false."
        )


def _trainer(
    name: str,
    stage: StageSettings,
    checkpoints: Path,
    arguments: Mapping[str, Any],
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
) -> lightning.Trainer:
    arguments, savers = {**TRAINER, **arguments}, []
    if stage.checkpoint_every and not arguments.get("fast_dev_run"):
        every = min(stage.checkpoint_every, stage.steps)
        savers = [SaveCheckpoints(checkpoints / name / NEWEST, every)]
    return make(
        "trainer",
        arguments,
        usual={"enable_model_summary": False, "log_every_n_steps": 10, **_device(arguments)},
        max_steps=stage.steps,
        max_epochs=-1,
        default_root_dir=checkpoints.parent,
        enable_checkpointing=False,
        logger=list(loggers),
        # one device has no other processes; Lightning would start MPI, where there is one, to ask
        plugins=[WholeCheckpoints(), *([LightningEnvironment()] if _alone(arguments) else [])],
        callbacks=[AttentionCheck(), FiniteNumbers(), *callbacks, *savers],
    )


def _alone(arguments: Mapping[str, Any]) -> bool:
    """Whether the arguments of the trainer ask for one device, and nobody started several processes."""
    started = TorchElasticEnvironment.detect() or SLURMEnvironment.detect()
    return arguments.get("devices") == 1 and arguments.get("num_nodes", 1) == 1 and not started


def _device(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The strategy where one GPU learns, unless the arguments name one."""
    gpu = arguments.get("accelerator", "auto") in ("gpu", "cuda", "auto") and torch.cuda.is_available()
    return (
        {"strategy": _OneGpu(torch.device("cuda", torch.cuda.current_device()))}
        if gpu and _alone(arguments)
        else {}
    )


class _OneGpu(SingleDeviceStrategy):
    """A GPU on which model and optimiser stay; Lightning carries both to the processor after every stage."""

    def teardown(self) -> None:
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
