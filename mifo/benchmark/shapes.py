"""Models of real shapes with random weights, and drawn instances to learn."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
)

from mifo.backbones.flux2.model import Flux2Model
from mifo.backbones.joint.qwen_model import QwenModel
from mifo.backbones.latent import LatentModel
from mifo.backbones.loading import freeze_in, model_folder
from mifo.backbones.mmdit.model import MMDiTModel
from mifo.backbones.settings import ModelSettings
from mifo.backbones.unet.model import UNetModel
from mifo.backbones.z_image.model import ZImageModel
from mifo.data.instances import InstanceSet
from mifo.errors import check_known
from mifo.method.prompts.instances import instance_tokens


@dataclass(frozen=True)
class Shapes:
    """A model of real shapes.

    Attributes:
        parts: makes the networks, by their names in a pipeline. side: of pictures, in pixels.
        adapted: whether stage 2 learns adapters. sampling: steps and scale of guidance of a distilled model.
        fields: of the model's own.
    """

    parts: Callable[[], dict[str, nn.Module]]
    model: type[LatentModel]
    side: int
    adapted: bool = False
    sampling: tuple[int, float] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def find_shapes(name: str) -> Shapes:
    """One of the `SHAPES`. Raises MifoError for another name."""
    check_known("benchmark.shapes", name, SHAPES)
    return SHAPES[name]


def random_model(shapes: str, device: torch.device, dtype: str, side: int | None = None) -> LatentModel:
    """A model of one of the `SHAPES` with random weights.

    The words are the miniature's, padded to the length of the shapes' prompts; a language model's are bytes.

    Args:
        side: of its pictures, in pixels; None: that of the shapes.

    Raises:
        MifoError: other shapes.
    """
    known, folder = find_shapes(shapes), model_folder(ModelSettings())
    torch.manual_seed(0)
    with torch.device(device), _made_in(getattr(torch, dtype)):
        parts: dict[str, Any] = known.parts()
    vae, side, kind, fields = parts["vae"], side or known.side, known.model, {**known.fields}
    for part in parts.values():
        freeze_in(torch.float32 if part is vae else getattr(torch, dtype), part)
    pixels = 2 ** (len(vae.config.block_out_channels) - 1)
    tokenizers: dict[str, Any] = {}
    if issubclass(kind, QwenModel):
        tokenizers["tokenizer"] = byte_tokenizer()
        fields |= {"side": side, "patches": side // (pixels * kind.patch)}
    else:
        for name in parts.keys() & {"text_encoder", "text_encoder_2"}:
            tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
            tokenizer.model_max_length = parts[name].config.max_position_embeddings
            tokenizers[name.replace("text_encoder", "tokenizer")] = tokenizer
        parts[kind.part].register_to_config(sample_size=side // pixels)
    if kind is UNetModel:
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=kind is Flux2Model)
    return kind(
        **tokenizers,
        **parts,
        **fields,
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


def _flux2_klein() -> dict[str, nn.Module]:
    """As the configuration files of FLUX.2 [klein] 4B have the parts."""
    transformer = Flux2Transformer2DModel(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )
    return {"transformer": transformer, "vae": AutoencoderKLFlux2(), "text_encoder": _qwen3_4b()}


def _z_image() -> dict[str, nn.Module]:
    """As the configuration files of Z-Image have the parts."""
    vae = _vae(
        16, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False
    )
    return {"transformer": ZImageTransformer2DModel(), "vae": vae, "text_encoder": _qwen3_4b()}


def _qwen3_4b() -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            vocab_size=151936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )


SHAPES = {
    "sd21": Shapes(_stable_diffusion_21, UNetModel, 512),
    "sdxl": Shapes(_stable_diffusion_xl, UNetModel, 1024, adapted=True),
    "sd35": Shapes(_stable_diffusion_35, MMDiTModel, 1024, adapted=True),
    "flux2_klein": Shapes(
        _flux2_klein, Flux2Model, 1024, adapted=True, sampling=(4, 1.0), fields={"distilled": True}
    ),
    "z_image": Shapes(_z_image, ZImageModel, 1024, adapted=True, sampling=(8, 1.0)),
    "miniature": Shapes(_miniature, UNetModel, 128),
}
# as Qwen3's for a message of a user, with the empty thoughts of an answer that has none
TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{%- endif %}{%- endif %}"
)


def byte_tokenizer() -> Qwen2Tokenizer:
    """As Qwen3's, but with a token for each byte."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = [*sorted(ByteLevel.alphabet()), *special]
    return Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate(vocabulary)},
        eos_token=special[2],
        extra_special_tokens=[special[1]],
        chat_template=TEMPLATE,
    )


@contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Weights are made in a precision, so that they never take more memory than they will."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


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
    tokens = tuple(instance_tokens(count))
    return InstanceSet("noise", image, masks, ("car",) * count, (None,) * count, tokens)


def row_of_boxes(count: int) -> list[tuple[float, float, float, float]]:
    """`count` boxes side by side."""
    return [((i + 0.1) / count, 0.2, (i + 0.9) / count, 0.8) for i in range(count)]
