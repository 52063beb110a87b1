"""Which diffusion model is loaded."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelSettings:
    """A pipeline of Stable Diffusion 1.x, 2.x or XL: a folder in the diffusers layout, or a single file."""

    name: str = "miniature"  # a name for people: logs, folders, `learned.json`
    source: str = (
        "embedded"  # "embedded" (the miniature inside the package), a folder, a .safetensors file, a hub id
    )
    revision: str | None = None  # branch, tag or commit of a hub id; None: its main branch
    config: str | None = (
        None  # of a single file: folder or hub id with tokenizers and configurations of its kind
    )
    dtype: str = "float32"  # of U-Net and text encoder: float32 | float16 | bfloat16; the VAE stays float32
    words: dict[str, Any] = field(default_factory=dict)  # others' words, each its textual-inversion file(s)
    lora: str | None = None  # a LoRA that learning starts from, a .safetensors file of diffusers or webui
    lora_scale: float = 1.0
    variant: str | None = None  # "fp16" loads model.fp16.safetensors and its like; None: model.safetensors
