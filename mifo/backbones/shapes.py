"""A model of shapes without numbers (device "meta"), to count parameters and memory and to check prompts."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mifo.backbones.kinds import check_kind, family_of
from mifo.backbones.latent import LatentModel
from mifo.backbones.loading import load_outline, model_folder
from mifo.backbones.settings import ModelSettings


def load_shapes(settings: ModelSettings) -> LatentModel:
    """The model of `settings` on the device "meta", of its small files alone.

    Raises:
        MifoError: as `load_outline`.
    """
    outline, folder = load_outline(settings), model_folder(settings, weights=False)
    family = family_of(folder, settings.t5)
    configs = check_kind(folder, settings.source, family)
    parts = {}
    with torch.device("meta"):
        for name in family.networks:
            kind: Any = family.parts[name]
            config = configs[name]
            if issubclass(kind, PreTrainedModel):
                parts[name] = kind(kind.config_class.from_dict(config))
            else:
                parts[name] = kind.from_config(config)
            dtype = torch.float32 if name == "vae" else getattr(torch, settings.dtype)
            nn.Module.to(parts[name], dtype).requires_grad_(False)
    return replace(outline, **parts)
