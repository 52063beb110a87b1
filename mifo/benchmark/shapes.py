"""Models of real shapes with random weights, and drawn instances to learn."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mifo.backbones.latent import LatentModel
from mifo.backbones.loading import model_folder
from mifo.backbones.mmdit.model import MMDiTModel
from mifo.backbones.settings import ModelSettings
from mifo.backbones.unet.model import UNetModel
from mifo.data.instances import InstanceSet
from mifo.errors import MifoError


def random_model(shapes: str, device: torch.device, dtype: str, side: int | None = None) -> LatentModel:
    """A model of one of the `SHAPES` with random weights.

    The words are the miniature's, padded to the length of the shapes' prompts.

    Args:
        side: of its pictures, in pixels; None: as in `SIDES`.

    Raises:
        MifoError: other shapes.
    """
    if shapes not in SHAPES:
        raise MifoError(f"benchmark.shapes={shapes} is not known; take {' or '.join(SHAPES)}.")
    folder = model_folder(ModelSettings())
    torch.manual_seed(0)
    with torch.device(device):
        parts: dict[str, Any] = SHAPES[shapes]()
    kind = MMDiTModel if "transformer" in parts else UNetModel
    vae = parts["vae"]
    tokenizers = {}
    for name in parts.keys() & {"text_encoder", "text_encoder_2"}:
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
        tokenizer.model_max_length = parts[name].config.max_position_embeddings
        tokenizers[name.replace("text_encoder", "tokenizer")] = tokenizer
    side = side or SIDES[shapes]
    parts[kind.part].register_to_config(sample_size=side // 2 ** (len(vae.config.block_out_channels) - 1))
    for part in parts.values():
        nn.Module.to(part, torch.float32 if part is vae else getattr(torch, dtype))
        part.requires_grad_(False).eval()
    if kind is MMDiTModel:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    return kind(
        **tokenizers,
        **parts,
        noise_scheduler=scheduler,
        name=shapes,
        source="random",
        revision=None,
        fingerprint="random",
        vocabulary="random",
    )


def _miniature() -> dict[str, nn.Module]:
    folder = model_folder(ModelSettings())
    return {
        "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet")),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")),
    }


def _stable_diffusion_21() -> dict[str, nn.Module]:
    """As the configuration files of Stable Diffusion 2.1 base have the parts."""
    unet = UNet2DConditionModel(
        sample_size=64,
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
    )
    return {"unet": unet, "vae": _vae(), "text_encoder": CLIPTextModel(_text(1024, 23, projection_dim=512))}


def _stable_diffusion_xl() -> dict[str, nn.Module]:
    """As the configuration files of Stable Diffusion XL base 1.0 have the parts."""
    unet = UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return {
        "unet": unet,
        "vae": _vae(),
        "text_encoder": CLIPTextModel(_text(768, 12, hidden_act="quick_gelu")),
        "text_encoder_2": CLIPTextModelWithProjection(_text(1280, 32)),
    }


def _stable_diffusion_35() -> dict[str, nn.Module]:
    """As the configuration files of Stable Diffusion 3.5 medium have the parts, without T5."""
    transformer = SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    vae = _vae(
        16, shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": CLIPTextModelWithProjection(_text(768, 12, hidden_act="quick_gelu")),
        "text_encoder_2": CLIPTextModelWithProjection(_text(1280, 32)),
    }


SHAPES: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "sd21": _stable_diffusion_21,
    "sdxl": _stable_diffusion_xl,
    "sd35": _stable_diffusion_35,
    "miniature": _miniature,
}
SIDES = {"sd21": 512, "sdxl": 1024, "sd35": 1024, "miniature": 128}  # of pictures, in pixels


def _vae(channels: int = 4, **others: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        sample_size=768,
        **others,
    )


def _text(width: int, layers: int, **others: int | str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=77,
        **{"hidden_act": "gelu", "projection_dim": width} | others,
    )


def random_instances(count: int, side: int) -> InstanceSet:
    """`count` instances side by side in an image of noise, `side` pixels wide and high."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, side, side), dtype=torch.uint8, generator=generator)
    columns = torch.arange(side) * count // side
    masks = (columns == torch.arange(count)[:, None]).float()[:, None].expand(-1, side, -1).contiguous()
    tokens = tuple(f"<asset{i}>" for i in range(count))
    return InstanceSet("noise", image, masks, ("car",) * count, (None,) * count, tokens)


def row_of_boxes(count: int) -> list[tuple[float, float, float, float]]:
    """`count` boxes side by side."""
    return [((i + 0.1) / count, 0.2, (i + 0.9) / count, 0.8) for i in range(count)]
