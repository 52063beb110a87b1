"""Which pipelines MIFO works on: those of Stable Diffusion 1.x and 2.x's kind, told by small files alone."""

from pathlib import Path
from typing import Any

from mifo.errors import MifoError
from mifo.files import read_json

CLASSES = {
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel",),
    "vae": ("AutoencoderKL",),
    "unet": ("UNet2DConditionModel",),
}
# What these keys must hold where they are there. Another number does not fit the code; a key that is None in
# Stable Diffusion stands for an input that MIFO does not give.
VALUES = {
    "vae": {"latent_channels": 4, "in_channels": 3, "shift_factor": None, "latents_mean": None},
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "attention_type": "default",
        "class_embed_type": None,
        "num_class_embeds": None,
        "addition_embed_type": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "time_cond_proj_dim": None,
    },
}


def check_kind(folder: Path, source: str) -> dict[str, dict[str, Any]]:
    """The configuration of the text encoder, VAE and U-Net of a pipeline folder, if MIFO can work on them.

    Raises:
        MifoError: a configuration is missing, damaged or of a model of another kind; it names `source`.
    """
    index = _read(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    configs = {part: _read(folder / part / "config.json") for part in ("text_encoder", "vae", "unet")}
    if index.get("text_encoder_2"):
        raise _other(source, "model_index.json", "text_encoder_2", "present", "absent")
    for part, classes in CLASSES.items():
        config = configs.get(part, {})
        named = {
            "model_index.json": index.get(part),
            f"{part}/config.json": config.get("_class_name") or config.get("architectures"),
        }
        for file, value in named.items():
            name = value[-1] if isinstance(value, list) and value else value
            if name is not None and name not in classes:
                raise _other(source, file, part, name, classes[0])
    for part, values in VALUES.items():
        for key, needed in values.items():
            if (value := configs[part].get(key, needed)) != needed:
                raise _other(source, f"{part}/config.json", key, value, needed)
    # a missing key takes the default of its class
    width, side = configs["text_encoder"].get("hidden_size", 512), configs["unet"].get("sample_size")
    if (read := configs["unet"].get("cross_attention_dim", 1280)) != width:
        needed = f"{width}, the width of the text encoder"
        raise _other(source, "unet/config.json", "cross_attention_dim", read, needed)
    if type(side) is not int or side < 1:
        raise _other(source, "unet/config.json", "sample_size", side, "a side of square latents, such as 64")
    return configs


def _read(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise MifoError(f"{file} is damaged: it holds no object with keys")
    return content


def _other(source: str, file: str, key: str, value: Any, needed: Any) -> MifoError:
    return MifoError(
        f"model.source={source} is a model of another kind: {key} in {file} is {value}, where MIFO needs "
        f"{needed}; name a text-to-image model of Stable Diffusion 1.x or 2.x's kind."
    )
