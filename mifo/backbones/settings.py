"""Which diffusion model is loaded."""

from dataclasses import dataclass


@dataclass
class ModelSettings:
    """A pipeline in the diffusers layout (tokenizer, text_encoder, vae, unet, scheduler)."""

    name: str = "miniature"  # a name for people: logs, folders, `learned.json`
    source: str = "embedded"  # "embedded" (the miniature inside the package), a local folder, or a hub id
    revision: str | None = None  # branch, tag or commit of a hub id; None: its main branch
    dtype: str = "float32"  # of U-Net and text encoder: float32 | float16 | bfloat16; the VAE stays float32
    variant: str | None = None  # "fp16" loads model.fp16.safetensors and its like; None: model.safetensors
