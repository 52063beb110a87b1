"""Runs tiny networks built like Stable Diffusion's once, to load GPU kernels before the first step."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from mifo.acceleration.channels_last import keep_channels_last
from mifo.acceleration.fused_attention import quick_to_start

_SIDE, _WIDTH, _TOKENS = 32, 64, 8  # pixels, channels and words; 32² pixels are enough for cuDNN's attention


def rehearse(device: torch.device) -> None:
    """Encode a picture, and pass forward and backward through small networks of Stable Diffusion's kinds.

    Nothing is drawn, which would change what others draw from the generators of this process.
    """
    vae = _network(_small_vae, torch.float32, device)
    keep_channels_last(vae.encoder)
    with torch.no_grad():
        vae.encode(torch.zeros(1, 3, _SIDE, _SIDE, device=device))
    unet = _network(_small_unet, torch.bfloat16, device)
    keep_channels_last(unet)
    noisy, words = (
        torch.zeros(1, *shape, dtype=torch.bfloat16, device=device)
        for shape in ((4, _SIDE, _SIDE), (_TOKENS, _WIDTH))
    )
    with quick_to_start(_SIDE**2):
        prediction = unet(noisy, torch.zeros(1, device=device), words, return_dict=False)[0]
        prediction.float().square().mean().backward()


def _network(build: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> Any:
    """A network of zeros, its weights channels-last."""
    with torch.device("meta"):
        network = build()
    network.to_empty(device=device)
    nn.Module.to(network, dtype)  # diffusers' own warns
    nn.Module.to(network, memory_format=torch.channels_last)
    with torch.no_grad():
        for each in (*network.parameters(), *network.buffers()):
            each.zero_()
    return network


def _small_vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(_WIDTH,))


def _small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=_SIDE,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(_WIDTH, _WIDTH),
        layers_per_block=1,
        attention_head_dim=1,
        cross_attention_dim=_WIDTH,
        use_linear_projection=True,
    )
