"""Which pipelines MIFO works on, told by small files alone: one `Family` for each layout of parts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    Flux2Transformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Model,
    T5EncoderModel,
    T5Tokenizer,
)

from mifo.backbones.configs import Config, Configs, read_config, with_defaults
from mifo.backbones.flux2.model import READ, Flux2Model
from mifo.backbones.latent import LatentModel
from mifo.backbones.mmdit.model import MMDiTModel
from mifo.backbones.schedulers import read_ddim, read_flow
from mifo.backbones.unet.model import UNetModel
from mifo.backbones.z_image.model import ZImageModel
from mifo.errors import MifoError

Sizes = Iterator[tuple[str, str, Any, Any]]
"""Part, key, its value, and what it must be where sizes of the parts fit each other."""


@dataclass(frozen=True)
class Family:
    """Pipelines of one layout.

    Attributes:
        pipeline: its class in diffusers, which reads single files.
        model: what is made of the parts. parts: their classes, by the names that diffusers gives them.
        values: what keys of a part's configuration must hold where they are there. Another number does not
            fit the code; a key that must be None stands for an input that MIFO does not give.
        sizes: what must agree between the parts. scheduler: reads that of a folder.
        zero_empty_prompt: see `UNetModel`; where model_index.json does not tell.
        sized: the part whose `sample_size` is the side of pictures; None: the denoiser's is that of latents.
    """

    pipeline: str
    model: type[LatentModel]
    parts: dict[str, Any]
    values: Configs
    sizes: Callable[[Configs], Sizes]
    scheduler: Callable[[Path], SchedulerMixin]
    zero_empty_prompt: bool = False
    sized: str | None = None

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of a pipeline."""
        return (*self.parts, "scheduler")

    @property
    def networks(self) -> tuple[str, ...]:
        """The parts that have weights."""
        return tuple(part for part in self.parts if not part.startswith("tokenizer"))


def _texts(configs: Configs) -> list[Config]:
    """The configurations of CLIP's text encoders; a missing key takes the default of its class."""
    defaults = {"hidden_size": 512, "projection_dim": 512}
    return [defaults | configs[part] for part in ("text_encoder", "text_encoder_2") if part in configs]


def _unet_sizes(configs: Configs) -> Sizes:
    unet, texts = configs["unet"], _texts(configs)
    width = sum(each["hidden_size"] for each in texts)
    if (read := unet.get("cross_attention_dim", 1280)) != width:
        needed = f"{width}, the width of the text encoder{'s' * (len(texts) > 1)}"
        yield "unet", "cross_attention_dim", read, needed
    if len(texts) > 1:
        # the pooled state of the last text encoder, and six numbers of sizes
        pooled = texts[-1]["projection_dim"] + 6 * (unet.get("addition_time_embed_dim") or 0)
        key = "projection_class_embeddings_input_dim"
        yield "unet", key, unet.get(key), pooled


def _mmdit_sizes(configs: Configs) -> Sizes:
    transformer, texts = with_defaults(configs["transformer"], SD3Transformer2DModel), _texts(configs)
    width, read = sum(each["hidden_size"] for each in texts), transformer["joint_attention_dim"]
    if read < width:
        needed = f"at least {width}, the width of the text encoders"
        yield "transformer", "joint_attention_dim", read, needed
    if third := configs.get("text_encoder_3"):
        yield "transformer", "joint_attention_dim", read, third.get("d_model", 512)
    pooled = sum(each["projection_dim"] for each in texts)
    yield "transformer", "pooled_projection_dim", transformer["pooled_projection_dim"], pooled
    channels = configs["vae"].get("latent_channels", 4)
    yield "transformer", "in_channels", transformer["in_channels"], channels
    yield "transformer", "out_channels", transformer["out_channels"] or channels, channels
    inner = transformer["attention_head_dim"] * transformer["num_attention_heads"]
    yield "transformer", "caption_projection_dim", transformer["caption_projection_dim"], inner
    side, patch = transformer["sample_size"], transformer["patch_size"]
    if type(side) is int and side % patch:
        yield "transformer", "sample_size", side, f"a multiple of the patches' side {patch}"


def _flux2_sizes(configs: Configs) -> Sizes:
    transformer = with_defaults(configs["transformer"], Flux2Transformer2DModel)
    text = configs["text_encoder"]
    layers = text.get("num_hidden_layers", 32)
    if layers <= READ[-1]:
        yield "text_encoder", "num_hidden_layers", layers, f"at least {READ[-1] + 1}"
    states = len(READ) * text.get("hidden_size", 4096)
    yield "transformer", "joint_attention_dim", transformer["joint_attention_dim"], states
    channels = 4 * configs["vae"].get("latent_channels", 32)
    yield "transformer", "in_channels", transformer["in_channels"], channels
    yield "transformer", "out_channels", transformer["out_channels"] or channels, channels
    width = sum(transformer["axes_dims_rope"])
    yield "transformer", "attention_head_dim", transformer["attention_head_dim"], width


def _z_image_sizes(configs: Configs) -> Sizes:
    transformer = with_defaults(configs["transformer"], ZImageTransformer2DModel)
    states = configs["text_encoder"].get("hidden_size", 4096)
    yield "transformer", "cap_feat_dim", transformer["cap_feat_dim"], states
    channels = configs["vae"].get("latent_channels", 4)
    yield "transformer", "in_channels", transformer["in_channels"], channels
    width = transformer["n_heads"] * sum(transformer["axes_dims"])
    yield "transformer", "dim", transformer["dim"], width


_VAE = {"latent_channels": 4, "in_channels": 3, "shift_factor": None, "latents_mean": None}
_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "attention_type": "default",
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
}
STABLE_DIFFUSION = Family(
    "StableDiffusionPipeline",
    UNetModel,
    {
        "tokenizer": CLIPTokenizer,
        "text_encoder": CLIPTextModel,
        "vae": AutoencoderKL,
        "unet": UNet2DConditionModel,
    },
    {"vae": _VAE, "unet": _UNET},
    _unet_sizes,
    read_ddim,
)
STABLE_DIFFUSION_XL = Family(
    "StableDiffusionXLPipeline",
    UNetModel,
    {**STABLE_DIFFUSION.parts, "tokenizer_2": CLIPTokenizer, "text_encoder_2": CLIPTextModelWithProjection},
    {"vae": _VAE, "unet": _UNET | {"addition_embed_type": "text_time"}},
    _unet_sizes,
    read_ddim,
    zero_empty_prompt=True,
)
STABLE_DIFFUSION_3 = Family(
    "StableDiffusion3Pipeline",
    MMDiTModel,
    {
        "tokenizer": CLIPTokenizer,
        "text_encoder": CLIPTextModelWithProjection,
        "vae": AutoencoderKL,
        "transformer": SD3Transformer2DModel,
        "tokenizer_2": CLIPTokenizer,
        "text_encoder_2": CLIPTextModelWithProjection,
    },
    {"vae": {"in_channels": 3, "latents_mean": None}},
    _mmdit_sizes,
    read_flow,
)
WITH_T5 = replace(
    STABLE_DIFFUSION_3,
    parts=STABLE_DIFFUSION_3.parts | {"tokenizer_3": T5Tokenizer, "text_encoder_3": T5EncoderModel},
)
FLUX_2 = Family(
    "Flux2KleinPipeline",
    Flux2Model,
    {
        "tokenizer": Qwen2Tokenizer,
        "text_encoder": Qwen3Model,
        "vae": AutoencoderKLFlux2,
        "transformer": Flux2Transformer2DModel,
    },
    {"vae": {"in_channels": 3, "patch_size": [2, 2]}, "transformer": {"patch_size": 1}},
    _flux2_sizes,
    read_flow,
    sized="vae",
)
Z_IMAGE = Family(
    "ZImagePipeline",
    ZImageModel,
    FLUX_2.parts | {"vae": AutoencoderKL, "transformer": ZImageTransformer2DModel},
    {
        "vae": {"in_channels": 3, "latents_mean": None},
        "transformer": {"all_patch_size": [2], "all_f_patch_size": [1], "siglip_feat_dim": None},
    },
    _z_image_sizes,
    read_flow,
    sized="vae",
)
# by `_class_name` in model_index.json
FAMILIES = {
    each.pipeline: each
    for each in (STABLE_DIFFUSION, STABLE_DIFFUSION_XL, STABLE_DIFFUSION_3, FLUX_2, Z_IMAGE)
}
# what a language model is saved as that writes too: its states are the same
_ALSO = {"Qwen3Model": "Qwen3ForCausalLM"}


def family_of(folder: Path, t5: bool) -> Family:
    """The family of a pipeline folder; where its index names no known class, told by its parts.

    Args:
        t5: with the third text encoder of Stable Diffusion 3.

    Raises:
        MifoError: model_index.json is damaged; or another family is to have T5.
    """
    index = pipeline_index(folder)
    second = index.get("text_encoder_2", (folder / "text_encoder_2").is_dir())
    other = STABLE_DIFFUSION_XL if second else STABLE_DIFFUSION
    if index.get("transformer", (folder / "transformer").is_dir()):
        other = STABLE_DIFFUSION_3
    found = FAMILIES.get(str(index.get("_class_name")), other)
    if t5 and found is not STABLE_DIFFUSION_3:
        raise MifoError("model.t5=true is for models of Stable Diffusion 3's kind; leave it out for others.")
    return WITH_T5 if t5 else found


def pipeline_index(folder: Path) -> Config:
    """What model_index.json holds; nothing where there is none."""
    file = folder / "model_index.json"
    return read_config(file) if file.exists() else {}


def check_kind(folder: Path, source: str, family: Family) -> Configs:
    """The configurations of the networks of a pipeline folder, by part, if MIFO can work on them.

    Raises:
        MifoError: a configuration is missing, damaged or of a model of another kind; it names `source`.
    """
    index = pipeline_index(folder)
    configs = {
        part: read_config(folder / part / "config.json", family.parts[part]) for part in family.networks
    }
    if index.get("text_encoder_2") and "text_encoder_2" not in family.parts:
        raise _other(source, "model_index.json", "text_encoder_2", "present", "absent")
    for part, kind in family.parts.items():
        config = configs.get(part, {})
        named = {
            "model_index.json": index.get(part),
            f"{part}/config.json": config.get("_class_name") or config.get("architectures"),
        }
        for file, value in named.items():
            name = value[-1] if isinstance(value, list) and value else value
            # tokenizers have two classes
            known = (None, kind.__name__, f"{kind.__name__}Fast", _ALSO.get(kind.__name__))
            if name not in known:
                raise _other(source, file, part, name, kind.__name__)
    for part, values in family.values.items():
        for key, needed in values.items():
            if (value := configs[part].get(key, needed)) != needed:
                raise _other(source, f"{part}/config.json", key, value, needed)
    for part, key, value, needed in family.sizes(configs):
        if value != needed:
            raise _other(source, f"{part}/config.json", key, value, needed)
    part, what = (family.sized, "pictures") if family.sized else (family.model.part, "latents")
    side = configs[part].get("sample_size")
    if type(side) is not int or side < 1:
        needed = f"a side of square {what}, such as 64"
        raise _other(source, f"{part}/config.json", "sample_size", side, needed)
    return configs


def _other(source: str, file: str, key: str, value: Any, needed: Any) -> MifoError:
    return MifoError(
        f"model.source={source} is a model of another kind: {key} in {file} is {value}, where MIFO needs "
        f"{needed}; name a text-to-image model of Stable Diffusion 1.x, 2.x, XL's or 3's kind, of "
        "FLUX.2 [klein]'s or of Z-Image's."
    )
