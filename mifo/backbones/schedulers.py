"""Schedulers of pipeline folders, read as the process that MIFO learns and samples with."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from mifo.backbones.configs import read_config, with_defaults
from mifo.errors import MifoError
from mifo.method.diffusion.ddim import DDIM
from mifo.method.diffusion.flow import Flow, Timesteps

# options of a flow's scheduler that change its times in another way than by `shift`
_OTHER = (
    "invert_sigmas shift_terminal use_karras_sigmas use_exponential_sigmas use_beta_sigmas "
    "stochastic_sampling"
).split()
_MANY = 200  # sampling steps, from which on more of them change no shift


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


def ddim_of(scheduler: DDIMScheduler, device: torch.device | str = "cpu") -> DDIM:
    """The process of a scheduler whose betas were computed on the CPU.

    Raises:
        MifoError: the scheduler clips or thresholds samples; its betas do not fit its timesteps; or its
            last timestep is pure noise, where a prediction of the noise tells nothing of the picture.
    """
    config, alphas = scheduler.config, scheduler.alphas_cumprod
    for key in ("clip_sample", "thresholding"):
        if config.get(key):
            raise MifoError(
                f"The scheduler's {key} is true, which is for pictures and not for latents; "
                f"set {key} to false in scheduler/scheduler_config.json."
            )
    if len(alphas) != config.num_train_timesteps:
        raise MifoError(
            f"The scheduler has {len(alphas)} betas, but num_train_timesteps is "
            f"{config.num_train_timesteps}; correct scheduler/scheduler_config.json."
        )
    if config.prediction_type == "epsilon" and alphas[-1] == 0:
        raise MifoError(
            "The scheduler's last timestep is pure noise (rescale_betas_zero_snr), which a model of "
            "prediction_type epsilon cannot start from; use a model that predicts v_prediction."
        )
    return DDIM(
        alphas.to(device),
        config.prediction_type,
        config.get("timestep_spacing", "leading"),
        config.get("steps_offset", 0),
        config.get("set_alpha_to_one", False),
    )


def flow_of(
    scheduler: FlowMatchEulerDiscreteScheduler,
    timesteps: Timesteps = Timesteps.logit_normal,
    even: bool = False,
    level: Callable[[int], float] | None = None,
) -> Flow:
    """The flow of a scheduler, unless it places its times otherwise.

    Args:
        even: whether the family's pipeline gives the scheduler its times.
        level: by a number of steps, the logarithm of the shift that the family's pipeline gives a
            scheduler that has none of its own. Times of learning are shifted as in `_MANY` steps.
    """
    config = scheduler.config
    for key in _OTHER:
        if config.get(key):
            raise MifoError(
                f"The scheduler's {key} is {config[key]}, which MIFO does not know; use a model whose "
                "scheduler has a fixed shift alone."
            )
    if not config.get("use_dynamic_shifting"):
        return Flow(config.shift, config.num_train_timesteps, timesteps, even)
    if level is None or config.get("time_shift_type", "exponential") != "exponential":
        raise MifoError(
            "The scheduler's use_dynamic_shifting is True, in a way that MIFO does not know; use a model "
            "whose scheduler has a fixed shift."
        )

    def shift_of(steps: int) -> float:
        return math.exp(level(steps))

    return Flow(shift_of(_MANY), config.num_train_timesteps, timesteps, even, shift_of)
