"""What a GPU loads at its first use, loaded ahead: kernels of PyTorch, cuDNN, cuBLAS and Triton."""

import logging
from collections.abc import Callable
from threading import Thread

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from mifo.attention.processors import quick_to_start
from mifo.performance.channels_last import keep_channels_last

log = logging.getLogger(__name__)

_SIDE, _WIDTH, _TOKENS = 32, 64, 8  # pixels, channels and words, of 32² pixels each: what cuDNN attends to


def load_libraries(device: torch.device) -> None:
    """Begin to load what learning would wait two seconds for at its first steps on a GPU.

    It goes on in a thread, beside the reading of weights. Without a GPU nothing happens.
    """
    if device.type == "cuda":
        Thread(target=_load, args=(device,), daemon=True).start()


def _load(device: torch.device) -> None:
    try:
        # a stream of its own, for another thread may capture a graph meanwhile
        with torch.cuda.stream(torch.cuda.Stream(device)):
            rehearse(device)
            torch.cuda.current_stream(device).synchronize()
    except RuntimeError as error:  # whoever needs them next will say so
        log.debug("Libraries of the GPU were not loaded ahead: %s", error)


def rehearse(device: torch.device) -> None:
    """Encode a picture, and pass forward and backward through small networks of Stable Diffusion's kinds.

    Nothing is drawn, which would change what others draw from the generators of this process.
    """
    vae = _network(_small_vae, torch.float32, device)
    with torch.no_grad():
        vae.encode(torch.zeros(1, 3, _SIDE, _SIDE, device=device))
    unet = _network(_small_unet, torch.bfloat16, device)
    noisy, words = (
        torch.zeros(1, *shape, dtype=torch.bfloat16, device=device)
        for shape in ((4, _SIDE, _SIDE), (_TOKENS, _WIDTH))
    )
    with quick_to_start(_SIDE**2):
        prediction = unet(noisy, torch.zeros(1, device=device), words, return_dict=False)[0]
        prediction.float().square().mean().backward()


def _network(build: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network of zeros, channels-last."""
    with torch.device("meta"):
        network = build()
    network.to_empty(device=device)
    nn.Module.to(network, dtype=dtype, memory_format=torch.channels_last)  # diffusers' own warns
    with torch.no_grad():
        for each in (*network.parameters(), *network.buffers()):
            each.zero_()
    keep_channels_last(network.encoder if isinstance(network, AutoencoderKL) else network)
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
