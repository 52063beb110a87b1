"""Which parameters of a model learn."""

import re

from torch import nn

from mifo.backbones.loading import DiffusionModel
from mifo.errors import MifoError

LEARN = ("tokens", "kv", "unet", "full", "lora")
_KEYS_AND_VALUES = re.compile(r"\.attn2\.to_[kv]\.weight$")


def new_rows(model: DiffusionModel) -> nn.Parameter:
    """The learned rows (N, width) that `add_instance_tokens` gave `model`."""
    return model.text_encoder.get_input_embeddings().rows


def trainable_parameters(model: DiffusionModel, learn: str) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters that learn beside the new token rows, by part of the model and by name.

    Args:
        learn: "tokens" none (Textual Inversion, arXiv 2208.01618); "kv" keys and values of cross-attention
            (Custom Diffusion, arXiv 2212.04488); "unet" the whole U-Net; "full" U-Net and text encoder;
            "lora" the adapters that `add_lora` made. The table of the known words never learns.

    Raises:
        MifoError: another value of `learn`.
    """
    if learn not in LEARN:
        raise MifoError(f"learn={learn} is not known; take one of {', '.join(LEARN)}.")
    unet = dict(model.unet.named_parameters())
    embedding = model.text_encoder.get_input_embeddings()
    apart = {id(parameter) for parameter in embedding.parameters()}
    text = {
        # transformers before 5.6 prefixes the names
        name.removeprefix("text_model."): parameter
        for name, parameter in model.text_encoder.named_parameters()
        if id(parameter) not in apart
    }
    chosen = {
        "tokens": ({}, {}),
        "kv": ({name: each for name, each in unet.items() if _KEYS_AND_VALUES.search(name)}, {}),
        "unet": (unet, {}),
        "full": (unet, text),
        "lora": tuple(
            {name: each for name, each in part.items() if "lora_" in name} for part in (unet, text)
        ),
    }[learn]
    return dict(zip(("unet", "text_encoder"), chosen, strict=True))


def set_trainable(model: DiffusionModel, learn: str) -> None:
    """Let the new token rows and what `trainable_parameters` names learn, and freeze everything else."""
    for part in (model.unet, model.text_encoder, model.vae):
        part.requires_grad_(False)
    for parameters in trainable_parameters(model, learn).values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    new_rows(model).requires_grad_(True)


def add_lora(model: DiffusionModel, rank: int) -> None:
    """Put low-rank adapters (LoRA, arXiv 2106.09685) on the attention projections of U-Net and text encoder.

    Raises:
        MifoError: peft, an optional dependency, is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MifoError(
            "learn=lora needs the package peft; install it with: pip install 'mifo[low_vram]'."
        ) from error
    for part, targets in (
        (model.unet, ["to_q", "to_k", "to_v", "to_out.0"]),
        (model.text_encoder, ["q_proj", "k_proj", "v_proj", "out_proj"]),
    ):
        # peft's own call: the models' `add_adapter` refuses releases of peft that do this just as well
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), part)
        for name, parameter in part.named_parameters():
            if "lora_" in name:  # learns in full precision, whatever that of the base model
                parameter.data = parameter.data.float()
