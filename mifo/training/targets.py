"""What the configuration names by `_target_`: trainer, optimisers, LR schedulers, callbacks and loggers."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from mifo.errors import MifoError, nearest, root_cause
from mifo.training.settings import StageSettings


def target(key: str, node: Any) -> Any:
    """The class or function that the `_target_` of `node` names, which takes the node's other keys.

    Raises:
        MifoError: there is no `_target_`, its package is not installed, it does not exist or cannot be
            called, or an argument of the node is none of its own.
    """
    path = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(path, str) or not path:
        raise MifoError(f"{key} needs a _target_, the class that it stands for; see conf/{key.split('.')[0]}")
    package, module = path.partition(".")[0], path.rpartition(".")[0]
    if package and package not in sys.modules and find_spec(package) is None:
        raise MifoError(
            f"{key}._target_={path} needs the package {package}, which is not installed; check its "
            f"spelling, or install it with: pip install {package}"
        )
    try:
        found = resolve_name(path)
    except Exception as error:
        hint = ""
        with suppress(ImportError, TypeError, ValueError):
            hint = nearest(path, [f"{module}.{name}" for name in dir(import_module(module))])
        told = " ".join(str(error).split())
        raise MifoError(
            f"{key}._target_={path} cannot be imported ({told}); {hint}check its spelling"
        ) from error
    arguments = {name: value for name, value in node.items() if name not in _OF_HYDRA}
    try:
        taken = inspect.signature(found).parameters
    except (TypeError, ValueError) as error:  # it cannot be called, or does not tell how
        raise MifoError(
            f"{key}._target_={path} has no arguments that can be read; name a class or a function"
        ) from error
    if not any(each.kind is each.VAR_KEYWORD for each in taken.values()):
        for name in arguments:
            if name not in taken:
                takes = f"{nearest(name, taken)}take of {', '.join(taken) or 'none'}"
                raise MifoError(f"{key}.{name} is no argument of {path}; {takes}")
    return found


def make(key: str, node: Mapping[str, Any], *inputs: Any, usual: Mapping[str, Any], **fixed: Any) -> Any:
    """Call what `node` names with `inputs`, the node's own keys and `fixed`.

    Args:
        usual: arguments that are passed if the target takes them and the node does not name them.

    Raises:
        MifoError: see `target`; or the call refuses its arguments.
    """
    taken = inspect.signature(target(key, node)).parameters
    usual = {name: value for name, value in usual.items() if name in taken and name not in node}
    try:
        return instantiate({**node, "_partial_": True, "_convert_": "all"})(*inputs, **usual, **fixed)
    except Exception as error:
        raise MifoError(f"{key} does not take its arguments: {root_cause(error)}") from error


def make_optimizer(
    stage: str, settings: StageSettings, parameters: Sequence[nn.Parameter], fused: bool
) -> torch.optim.Optimizer:
    """The optimiser of a stage, in one kernel if `fused` and if it can; `learning_rate` is its `lr`."""
    usual = {
        "lr": settings.learning_rate,
        "betas": tuple(settings.betas),
        "weight_decay": settings.weight_decay,
        "eps": settings.eps,
        "fused": fused or None,
    }
    return make(f"learning.{stage}.optimizer", settings.optimizer, parameters, usual=usual)


def make_lr_scheduler(stage: str, settings: StageSettings, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The scheduler of a stage's learning rate; functions of diffusers get the numbers of steps."""
    usual = {"num_warmup_steps": settings.lr_warmup_steps, "num_training_steps": settings.steps}
    return make(f"learning.{stage}.lr_scheduler", settings.lr_scheduler, optimizer, usual=usual)


def check_optimizer(stage: str, settings: StageSettings) -> None:
    """Refuse an optimiser or LR scheduler that cannot be made, tried on a single number."""
    key = f"learning.{stage}"
    optimizer = make_optimizer(stage, settings, [nn.Parameter(torch.zeros(1))], fused=True)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise MifoError(f"{key}.optimizer is no optimiser of torch; see conf/optimizer.")
    scheduler = make_lr_scheduler(stage, settings, optimizer)
    step = getattr(scheduler, "step", None)
    needed = inspect.signature(step).parameters.values() if step else ()
    if step is None or any(each.default is each.empty for each in needed):
        raise MifoError(f"{key}.lr_scheduler is no scheduler that counts steps alone; see conf/lr_scheduler.")


_OF_HYDRA = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
