"""Models of real shapes with random weights, and drawn instances to learn."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mifo.backbones.loading import model_folder
from mifo.backbones.settings import ModelSettings
from mifo.backbones.unet.model import UNetModel
from mifo.data.instances import InstanceSet
from mifo.errors import MifoError

SHAPES = ("sd21", "miniature")


def random_model(shapes: str, device: torch.device, dtype: str, side: int | None = None) -> UNetModel:
    """A model with the shapes of Stable Diffusion 2.1 base, or the miniature's, and random weights.

    The words are the miniature's, padded to the length of the shapes' prompts.

    Args:
        side: of its pictures, in pixels; None: 512 and the miniature's 128.

    Raises:
        MifoError: other shapes.
    """
    if shapes not in SHAPES:
        raise MifoError(f"benchmark.shapes={shapes} is not known; take {' or '.join(SHAPES)}.")
    folder = model_folder(ModelSettings())
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
    torch.manual_seed(0)
    with torch.device(device):
        if shapes == "miniature":
            unet = UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(folder, subfolder="unet")
            )
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))
            text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder"))
        else:
            unet, vae, text = stable_diffusion()
            tokenizer.model_max_length = text.config.max_position_embeddings
    if side is not None:
        unet.register_to_config(sample_size=side // 2 ** (len(vae.config.block_out_channels) - 1))
    for part in (unet, text):
        nn.Module.to(part, getattr(torch, dtype))
    for part in (unet, text, vae):
        part.requires_grad_(False).eval()
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    return UNetModel(tokenizer, text, vae, unet, scheduler, shapes, "random", None, "random", "random")


def stable_diffusion() -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """The parts of Stable Diffusion 2.1 base, as its configuration files have them."""
    unet = UNet2DConditionModel(
        sample_size=64,
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=768,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            max_position_embeddings=77,
            hidden_act="gelu",
            projection_dim=512,
        )
    )
    return unet, vae, text


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
