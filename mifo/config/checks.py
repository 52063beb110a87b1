"""What no single task checks, refused before any work begins.

Torch, Lightning and what needs them are imported by the checks that ask them, so that a task that needs none
of them starts at once.
"""

import inspect
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mifo.config.schema import (
    EvaluateSettings,
    ExportTaskSettings,
    LearnSettings,
    ModelTaskSettings,
    QualitySettings,
    SynthesizeSettings,
    TaskSettings,
)
from mifo.errors import MifoError, check_known, check_least
from mifo.exporting.settings import check_export
from mifo.method.guidance.settings import check_guidance
from mifo.method.synthesis.settings import check_synthesis
from mifo.metrics.scores import RANGES


def check(settings: TaskSettings) -> None:
    """Refuse settings that cannot work, and make the folder of the instances absolute, since it is recorded.

    Raises:
        MifoError: one sentence that names the key and the fix.
    """
    _check_finite(asdict(settings))
    check_known("device", settings.device, ("auto", "cpu", "cuda"))
    if settings.device == "cuda":
        _check_gpu()
    check_seed("seed", settings.seed)
    for group in ("callbacks", "logger"):
        for name, node in getattr(settings, group, {}).items():
            _check_node(group, name, node, settings)
    if (metrics := getattr(settings, "metrics", None)) is not None:
        check_least("metrics", metrics, batch_size=1, windows=1)
    for name in getattr(settings, "objectives", []):
        check_known("objectives", name, RANGES)
        if metrics is None:
            raise MifoError(f"objectives={name} is measured by metrics, but metrics=none; choose metrics")
    if isinstance(settings, ModelTaskSettings | QualitySettings):
        from mifo.acceleration.profile import check_performance

        check_performance(settings.performance)
    if isinstance(settings, SynthesizeSettings | LearnSettings | QualitySettings):
        check_synthesis(settings.synthesis)
        check_guidance(settings.guidance)
    if isinstance(settings, QualitySettings):
        # two figures have an interval; of 64 scenes some show one thing, some two
        check_least("", settings, reconstructions=2, scenes=64, per_category=2, pictures=2, box_prompts=1)
    if isinstance(settings, ExportTaskSettings):
        check_export(settings)
    if isinstance(settings, LearnSettings):
        from mifo.method.losses.timeline import check_penalty
        from mifo.training.fit import check_float8, check_learning

        check_learning(settings.learning)
        check_float8(settings.learning, settings.performance)
        check_penalty(settings.penalty)
        _check_trainer(settings.trainer)
        if "" in [text.strip() for text in settings.instances.class_names or []]:
            raise MifoError("instances.class_names has an empty name; give each instance a word, such as car")
    instances = settings.instances if isinstance(settings, LearnSettings | EvaluateSettings) else None
    if instances and instances.folder:
        instances.folder = str(Path(instances.folder).expanduser().absolute())


def check_seed(key: str, seed: int) -> None:
    """Refuse what no generator takes."""
    if not 0 <= seed < 2**32:
        raise MifoError(f"{key}={seed} is no seed; take a whole number from 0 to {2**32 - 1}")


def _check_finite(node: Any, key: str = "") -> None:
    """Refuse NaN and infinity anywhere; NaN would pass every comparison below."""
    if isinstance(node, float) and not math.isfinite(node):
        raise MifoError(f"{key}={node} is not finite; take a number")
    if isinstance(node, dict | list | tuple):
        for name, each in node.items() if isinstance(node, dict) else enumerate(node):
            _check_finite(each, f"{key}.{name}" if key else str(name))


def _check_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise MifoError(
            "device=cuda, which trainer=gpu sets too, but torch sees no GPU; take device=cpu or trainer=cpu, "
            "or a torch built for this GPU"
        )


def _check_node(group: str, name: str, node: Any, settings: TaskSettings) -> None:
    """Refuse a callback or a logger that cannot be made, or that would find nothing to do."""
    from lightning import Callback
    from lightning.pytorch.loggers import Logger, WandbLogger

    kind = Callback if group == "callbacks" else Logger
    if issubclass(_class_of(f"{group}.{name}", node, kind), WandbLogger):
        _check_wandb(f"logger.{name}", node, settings)
    if isinstance(node.get("metrics"), dict) and node["metrics"].get("given", "own") is None:
        raise MifoError(
            f"{group}.{name} scores pictures, for which metrics=none leaves no judge; choose metrics, or "
            "leave it out"
        )


def _class_of(key: str, node: Any, kind: type) -> type:
    """The class that a callback or a logger is made of."""
    from mifo.training.targets import target

    found = target(key, node)
    if not (inspect.isclass(found) and issubclass(found, kind)):
        raise MifoError(
            f"{key}._target_={node['_target_']} is no {kind.__name__} of Lightning; name a class that is one"
        )
    return found


def _check_wandb(key: str, node: dict[str, Any], settings: TaskSettings) -> None:
    """Refuse what Weights & Biases would refuse after all learning, or without a word."""
    project = str(node.get("project") or "")
    if len(project) > 128 or re.search(r"[/\\#?%:]", project):
        raise MifoError(
            f"{key}.project={project} is no name for a project; take up to 128 letters without /\\#?%:"
        )
    for tag in node.get("tags") or []:
        if not 1 <= len(str(tag)) <= 64:
            raise MifoError(f"{key}.tags has the tag '{tag}' of {len(str(tag))} letters; take 1 to 64")
    # what is learned is kept under the name of the group or the method
    for name in ("group", "job_type", "name"):
        if len(str(node.get(name) or "")) > 128:
            raise MifoError(f"{key}.{name} has {len(str(node[name]))} letters; take up to 128")
    for name in ("group", "method"):
        if len(getattr(settings, name, None) or "") > 128:
            raise MifoError(f"{name} has {len(getattr(settings, name))} letters; {key} takes up to 128")


def _check_trainer(arguments: dict[str, Any]) -> None:
    if "precision" in arguments:
        raise MifoError(
            "trainer.precision is set by the performance profile; take "
            "performance.learning_precision=bfloat16 (or float16, float32) instead"
        )
    from mifo.training.fit import check_trainer

    check_trainer(arguments)
    every = arguments.get("log_every_n_steps", 1)
    if type(every) is not int or every < 1:
        raise MifoError("trainer.log_every_n_steps must be at least 1; take logger=none to log nothing")
