"""Checks of a setup, made in seconds: `mifo doctor` tells every problem, other commands refuse the first.

A check returns a line about what it found, raises `MifoError`, or logs warnings.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from mifo.acceleration.profile import available
from mifo.backbones.latent import LatentModel
from mifo.backbones.loading import model_folder
from mifo.backbones.shapes import load_shapes
from mifo.backbones.weights import weight_files
from mifo.commands.setup import device_of, has_wandb_key, tell_memory
from mifo.commands.synthesize import check_layouts
from mifo.config.schema import LearnSettings, RunSettings
from mifo.data.class_pictures import class_prompts
from mifo.data.instances import InstanceSet, read_instances
from mifo.data.layouts import Layout, layouts
from mifo.data.mask_pyramid import MaskPyramid
from mifo.errors import MifoError
from mifo.files import check_room
from mifo.making.class_pictures import cache_folder
from mifo.metrics.evaluators import check_evaluators
from mifo.training.fit import CHECKPOINTS, room
from mifo.training.memory import learning_memory, synthesis_memory

MINIATURE = (
    "The miniature was made from drawings of twelve things and draws a cartoon of a photograph at best; take "
    "model=sd15, model=sd21 or model=sdxl for what the photograph shows."
)

log = logging.getLogger(__name__)


@dataclass
class Setup:
    """What checks look at, each part read once."""

    settings: LearnSettings

    @cached_property
    def instances(self) -> InstanceSet:
        return read_instances(self.settings.instances)

    @cached_property
    def model(self) -> LatentModel:
        """On the device "meta", with the instances' words and the adapters that will learn."""
        model = load_shapes(self.settings.model)
        model.add_words(self.instances.tokens, self.instances.initializers)
        finetuning = self.settings.learning.finetuning
        if finetuning.steps and finetuning.trainable == "lora":
            model.add_lora(finetuning.lora_rank)
        return model

    @cached_property
    def layouts(self) -> list[Layout]:
        assert isinstance(self.settings, RunSettings)
        return layouts(self.settings.layout, self.instances.tokens)


def picture(setup: Setup) -> str:
    """The image, and a mask for each instance."""
    found = setup.instances
    height, width = found.image.shape[1:]
    shares = ", ".join(
        f"{token} {share:.1%}"
        for token, share in zip(found.tokens, found.masks.mean((1, 2)).tolist(), strict=True)
    )
    if setup.settings.instances.folder and setup.settings.model.source == "embedded":
        log.warning(MINIATURE)
    return f"{found.name}, {width}×{height}; share of the picture: {shares}"


def sizes(setup: Setup) -> str:
    """Whether each instance is seen in the latents, and where attention is compared with its mask."""
    side, (height, width) = setup.model.image_size, setup.instances.image.shape[1:]
    if 2 * min(height, width) < side:
        log.warning(
            "The picture has %d×%d pixels and is enlarged to %d×%d for this model, so that it shows few "
            "details to learn; take a larger one.",
            *(width, height, side, side),
        )
    sites, masks = setup.model.default_sites, setup.instances.resized(side)[1]
    wanted = sorted({site.size for site in (*sites.semantic, *sites.finetuning)})
    found = MaskPyramid.of(masks, wanted, setup.model.latent_shape[1:])
    found.check()
    for i, token in enumerate(setup.instances.tokens):
        unseen = [f"{h}×{w}" for (h, w), each in found.at.items() if each[0, i].max() < 0.5]
        if unseen:
            log.warning(
                "%s is too small to be seen where attention has %s pixels, and is learned from the rest; cut "
                "the picture closer.",
                token,
                " and ".join(unseen),
            )
    return f"masks are read at {', '.join(f'{h}×{w}' for h, w in wanted)}"


def words(setup: Setup) -> str:
    """Prompts of learning, with all instances and with the classes."""
    learning = setup.settings.learning
    named = learning.template.format(" and ".join(setup.instances.tokens))
    used = len(setup.model.words(named).words)
    if learning.has_prior:
        if learning.prior.folder is None:
            setup.model.check_scale("learning.prior.guidance_scale", learning.prior.guidance_scale)
        for prompt in class_prompts(setup.instances, learning.prior):
            setup.model.words(prompt)
        if setup.instances.class_names is None and learning.prior.folder is None:
            log.warning(
                "instances.class_names is not given, so that the prior's pictures show some thing; name the "
                "instances, as instances.class_names=[cat,mug]."
            )
    return f"{', '.join(setup.instances.tokens)}; '{named}' has {used} words"


def layout(setup: Setup) -> str:
    """Prompts and boxes of the pictures."""
    assert isinstance(setup.settings, RunSettings)
    check_layouts(setup.settings, setup.layouts, setup.instances.tokens)
    boxes = sum(len(each.boxes) for each in setup.layouts)
    return f"prompts: {len(setup.layouts)}, boxes: {boxes}"


def weights(setup: Setup) -> str:
    """The files of the model's weights."""
    settings = setup.settings.model
    folder, source = model_folder(settings, weights=False), Path(settings.source).expanduser()
    numbers = sum(each.numel() for each in setup.model.denoiser.parameters())
    told = (
        f"{settings.name}, {setup.model.image_size} pixels, {numbers / 1e6:.1f} million weights that denoise"
    )
    try:
        for part in () if source.is_file() else (*setup.model.networks, "vae"):
            weight_files(folder, part, settings.variant)
    except MifoError:
        if source.exists() or settings.source == "embedded":
            raise
        log.warning("The weights of %s are not here yet; the first run downloads them.", settings.source)
    return told


def disk(setup: Setup) -> str:
    """Room for checkpoints, the result and class pictures."""
    learning, output = setup.settings.learning, Path(setup.settings.paths.output)
    needed = room(setup.model, learning.stages, output / CHECKPOINTS, learning.save_half)
    check_room(output, needed)
    if learning.has_prior and learning.prior.folder is None:
        check_room(cache_folder(learning.prior), learning.prior.pictures * setup.model.image_size**2 * 3)
    return f"{output} has room for {needed / 2**30:.2f} GiB"


def memory(setup: Setup) -> str:
    """The GPU's memory, where there is one."""
    settings, model = setup.settings, setup.model
    device = device_of(settings)
    performance = available(settings.performance, device, model.dtype)
    needed = learning_memory(model, settings.learning, performance)
    if isinstance(settings, RunSettings):
        pictures = synthesis_memory(
            load_shapes(settings.model), settings.synthesis, settings.guidance, performance
        )
        needed = max(needed, pictures, key=lambda each: each.total)
    return tell_memory(needed, device)


def evaluators(setup: Setup) -> str:
    """The models that score pictures."""
    metrics = setup.settings.metrics
    if metrics is None:
        return "none: metrics=none"
    check_evaluators(metrics)
    names = dict.fromkeys((metrics.image_text.name, metrics.image.source))
    return f"protocol {metrics.protocol}: {' and '.join(names)}"


def loggers(setup: Setup) -> str:
    """Where curves go."""
    nodes = setup.settings.logger
    if any("WandbLogger" in node.get("_target_", "") for node in nodes.values()) and not has_wandb_key():
        log.warning("Nobody is logged in to Weights & Biases, so that runs stay offline; run wandb login.")
    return ", ".join(nodes) or "none: logger=none"


Check = Callable[[Setup], str]
LEARNING: tuple[Check, ...] = (picture, sizes, words)
ALL: tuple[Check, ...] = (*LEARNING, layout, weights, evaluators, disk, memory, loggers)


def check_ready(setup: Setup, checks: Iterable[Check] = LEARNING) -> None:
    """Make checks before work begins; where a GPU is in use its memory too.

    Raises:
        MifoError: the first that a check raises.
    """
    gpu = setup.settings.device != "cpu" and torch.cuda.is_available()
    for check in (*checks, memory) if gpu else checks:
        check(setup)
