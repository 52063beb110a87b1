"""Learning from first to last: new tokens, both stages, the folder `learned/`."""

import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from mifo.data.instances import InstanceSet
from mifo.data.learning_data import LearningData
from mifo.data.prior import own_picture_files
from mifo.errors import MifoError
from mifo.learning.settings import LearningSettings, StageSettings
from mifo.learning.stages import OPTIMIZERS, SCHEDULES, Finetuning, LearningStage, SemanticLearning
from mifo.models.learned import refuse_existing, save_learned
from mifo.models.loading import DiffusionModel
from mifo.models.tokens import add_instance_tokens
from mifo.models.trainable import LEARN, add_lora
from mifo.penalty.settings import PenaltySettings
from mifo.performance.profile import PRECISIONS, available, ready_for_learning
from mifo.performance.settings import PerformanceSettings
from mifo.prompts.instances import INSTANCE


def check_learning(settings: LearningSettings) -> None:
    """Refuse impossible settings before any model is loaded.

    Raises:
        MifoError: naming the key and the values that it takes.
    """
    for name, stage in (("semantic", settings.semantic), ("finetuning", settings.finetuning)):
        key = f"learning.{name}"
        if stage.learn not in LEARN:
            raise MifoError(f"{key}.learn={stage.learn} is not known; take one of {', '.join(LEARN)}.")
        if stage.optimizer not in OPTIMIZERS:
            raise MifoError(
                f"{key}.optimizer={stage.optimizer} is not known; take {' or '.join(OPTIMIZERS)}."
            )
        if stage.schedule not in SCHEDULES:
            raise MifoError(
                f"{key}.schedule={stage.schedule} is not known; take one of {', '.join(SCHEDULES)}."
            )
        if stage.steps < 0 or stage.batch_size < 1 or stage.checkpoint_every < 0:
            raise MifoError(
                f"{key} needs steps and checkpoint_every of at least 0, and batch_size of at least 1."
            )
        for value in ("learning_rate", "weight_decay", "eps", "gradient_clip"):
            if getattr(stage, value) < 0:
                raise MifoError(f"{key}.{value}={getattr(stage, value)} is negative; take at least 0.")
        if len(stage.betas) != 2 or not all(0 <= beta < 1 for beta in stage.betas):
            raise MifoError(
                f"{key}.betas={list(stage.betas)} must be two numbers of at least 0 and less than 1."
            )
        if stage.learn == "lora" and stage.lora_rank < 1:
            raise MifoError(f"{key}.lora_rank={stage.lora_rank} is too small; take at least 1.")
    if settings.semantic.learn != "tokens":
        raise MifoError(
            "learning.semantic.learn must be tokens: the first stage learns the new token rows alone."
        )
    finetuned = settings.finetuning.steps > 0
    if finetuned and settings.finetuning.learn == "lora" and find_spec("peft") is None:
        raise MifoError(
            "learning.finetuning.learn=lora needs the package peft; install it with: "
            "pip install 'mifo[low_vram]'."
        )
    if not _names_instances_once(settings.template):
        raise MifoError(
            f"learning.template={settings.template!r} must name the instances once; use {{}} once: "
            "'a photo of {}'."
        )
    if not 0 <= settings.flip_probability <= 1:
        raise MifoError(f"learning.flip_probability={settings.flip_probability} is not between 0 and 1.")
    if settings.prior.weight < 0:
        raise MifoError(
            f"learning.prior.weight={settings.prior.weight} is negative; take 0 to leave the prior out."
        )
    if settings.prior.weight and not settings.prior.folder and settings.prior.pictures < 1:
        raise MifoError(
            "learning.prior.pictures must be at least 1; set learning.prior.weight=0 to leave them out."
        )
    if finetuned and settings.prior.weight and settings.prior.folder is not None:
        own_picture_files(settings.prior.folder)


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
    checkpoint and ends with the same result as without. The checkpoints go when the result is saved.

    Args:
        model: a base model without new tokens; afterwards what was learned is in it, on the trainer's device.
        trainer: arguments of `lightning.Trainer` that the settings do not fix, as accelerator, precision.
        config: YAML text of the run's configuration, saved beside the result.
        performance: how the hardware is used; None: as Lightning and PyTorch do by themselves.

    Returns:
        `folder/learned`.

    Raises:
        MifoError: impossible settings, half-precision weights that can not learn, or `folder/learned` exists.
    """
    check_learning(settings)
    trainer, graphs, passes_in = dict(trainer or {}), False, None
    if performance is not None:
        performance = available(performance, model.device)
        graphs = performance.cuda_graphs
        if not performance.autocast and performance.learning_precision == "bfloat16":
            passes_in = torch.bfloat16
        trainer.setdefault(
            "precision", PRECISIONS["float32" if passes_in else performance.learning_precision]
        )
        ready_for_learning(model, performance)
    _check_precision(model, settings, trainer)
    target, checkpoints = Path(folder) / "learned", Path(folder) / "checkpoints"
    refuse_existing(target)
    lightning.seed_everything(seed, verbose=False)
    add_instance_tokens(model, instances.tokens, instances.initializers, seed)
    stages: list[tuple[type[LearningStage], StageSettings, float]] = [
        (SemanticLearning, settings.semantic, 0.0),
        (Finetuning, settings.finetuning, settings.prior.weight),
    ]
    steps: dict[str, int] = {}
    for stream, (stage_class, stage, prior_weight) in enumerate(stages):
        if not stage.steps:
            continue
        runner = _trainer(stage_class.stage, stage, checkpoints, trainer, callbacks, loggers)
        model.to(runner.strategy.root_device)
        if stage.learn == "lora":
            add_lora(model, stage.lora_rank)
        data = LearningData(model, instances, settings, stage, seed, stream, prior_weight > 0, performance)
        module = stage_class(model, instances, stage, penalty, prior_weight, graphs, passes_in)
        last = checkpoints / stage_class.stage / "last.ckpt"
        with module.recording():
            runner.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
        steps[stage_class.stage] = runner.global_step
    save_learned(
        target,
        model,
        class_names=instances.class_names,
        initializers=instances.initializers,
        stages=steps,
        learn=settings.finetuning.learn if settings.finetuning.steps else "tokens",
        lora_rank=settings.finetuning.lora_rank,
        half=settings.save_half,
        config=config,
    )
    for part in (model.unet, model.text_encoder):
        part.requires_grad_(False).eval()
    shutil.rmtree(checkpoints, ignore_errors=True)
    return target


def _check_precision(model: DiffusionModel, settings: LearningSettings, trainer: Mapping[str, Any]) -> None:
    if model.dtype == torch.float32:
        return
    if settings.finetuning.steps and settings.finetuning.learn not in ("tokens", "lora"):
        raise MifoError(
            f"learning.finetuning.learn={settings.finetuning.learn} needs model.dtype=float32, since small "
            "updates are lost in half precision; take that, or learn=lora."
        )
    if "mixed" not in str(trainer.get("precision", "")):
        raise MifoError(
            "model.dtype in half precision needs performance.learning_precision=bfloat16 (or float16) to "
            "learn."
        )


def _trainer(
    name: str,
    stage: StageSettings,
    checkpoints: Path,
    arguments: Mapping[str, Any],
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
) -> lightning.Trainer:
    savers = []
    if stage.checkpoint_every and not arguments.get("fast_dev_run"):
        every = min(stage.checkpoint_every, stage.steps)
        savers = [
            ModelCheckpoint(
                checkpoints / name, "last", every_n_train_steps=every, enable_version_counter=False
            )
        ]
    fixed = {
        "max_steps": stage.steps,
        "max_epochs": -1,
        "gradient_clip_val": stage.gradient_clip or None,
        "default_root_dir": checkpoints.parent,
        "enable_checkpointing": bool(savers),
        "logger": list(loggers),
    }
    if clashes := sorted({*fixed, "callbacks"} & {*arguments}):
        raise MifoError(f"trainer.{clashes[0]} is fixed by learning and callbacks; take it out of trainer.")
    usual = {"enable_model_summary": False, "log_every_n_steps": 10, **_no_others(arguments)}
    return lightning.Trainer(callbacks=[*callbacks, *savers], **{**usual, **arguments, **fixed})


def _no_others(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """That one device has no other processes; Lightning would start MPI, where there is one, to ask."""
    alone = arguments.get("devices") == 1 and arguments.get("num_nodes", 1) == 1
    started = TorchElasticEnvironment.detect() or SLURMEnvironment.detect()
    return {"plugins": [LightningEnvironment()]} if alone and not started else {}
