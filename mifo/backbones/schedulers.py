"""Schedulers of pipeline folders, read as the process that MIFO samples with."""

import inspect
from pathlib import Path

import diffusers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from mifo.backbones.configs import read_config, with_defaults
from mifo.errors import MifoError


def read_ddim(folder: Path) -> DDIMScheduler:
    """The model's scheduler as DDIM, whichever class it has itself; keys that DDIM lacks have no effect.

    Raises:
        MifoError: a class without betas, or a value of another type than its class takes.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    name = read_config(file).get("_class_name", "DDIMScheduler")
    own = getattr(diffusers, name) if name in DDIMScheduler._compatibles else None
    if own is None or "beta_start" not in inspect.signature(own).parameters:
        raise MifoError(
            f"scheduler/scheduler_config.json in {folder} is of the class {name}, which has no betas for "
            "DDIM; name a text-to-image model of Stable Diffusion 1.x, 2.x or XL's kind."
        )
    # a missing key takes the default of its own class; only DDIM and DDPM clip, and only where they say so
    known = {"clip_sample": False, "set_alpha_to_one": False} | with_defaults(read_config(file, own), own)
    wanted = inspect.signature(DDIMScheduler).parameters
    return DDIMScheduler(**{key: value for key, value in known.items() if key in wanted})


def read_flow(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The model's scheduler of a rectified flow.

    Raises:
        MifoError: another class, or a value of another type than it takes.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_config(file, FlowMatchEulerDiscreteScheduler)
    name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if name != "FlowMatchEulerDiscreteScheduler":
        raise MifoError(
            f"scheduler/scheduler_config.json in {folder} is of the class {name}, where a rectified flow has "
            "FlowMatchEulerDiscreteScheduler; name a text-to-image model of Stable Diffusion 3's kind."
        )
    return FlowMatchEulerDiscreteScheduler.from_config(config)
