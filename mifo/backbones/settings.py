"""Which diffusion model is loaded."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelSettings:
    """A pipeline of Stable Diffusion 1.x, 2.x, XL or 3, FLUX.2 [klein] or Z-Image: a folder or a file."""

    name: str = "miniature"  # a name for people: logs, folders, `learned.json`
    # "embedded" or "embedded_mmdit" (the package's miniatures), a folder, a .safetensors file, a hub id
    source: str = "embedded"
    revision: str | None = None  # branch, tag or commit of a hub id; None: its main branch
    config: str | None = None  # of a single file: folder or hub id of its tokenizers and configurations
    dtype: str = "float32"  # of denoiser and text encoders, not of the VAE: float32 | float16 | bfloat16
    words: dict[str, Any] = field(default_factory=dict)  # others' words, each its textual-inversion file(s)
    lora: str | None = None  # a LoRA that learning starts from, a .safetensors file of diffusers or webui
    lora_scale: float = 1.0
    variant: str | None = None  # "fp16" loads model.fp16.safetensors and its like; None: model.safetensors
    t5: bool = False  # of Stable Diffusion 3: load its third text encoder too, of 9.5 GB in half precision
    timesteps: str = "logit_normal"  # of transformers, as learning draws them: logit_normal | uniform
    # of FLUX.2 and Z-Image: of pictures, in pixels; None: as the VAE's configuration says
    side: int | None = None
    guidance: float = 4.0  # what a FLUX.2 model reads that embeds the strength of guidance; others have none
    # of transformers: maps are shares of the attention to words alone or to pixels alone (own), or of a
    # pixel's whole attention (row)
    maps: str = "own"
