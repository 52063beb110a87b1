"""Which parameters of a denoising network and its text encoders learn."""

from collections.abc import Mapping, Sequence
from re import Pattern
from typing import Any

from torch import nn
from transformers import Qwen3Model, T5EncoderModel

from mifo.backbones.model import Trainable
from mifo.errors import check_package

_ROWS_ALONE = (T5EncoderModel, Qwen3Model)  # text encoders of which nothing but new rows learns
_ADAPTED_TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


def trainable_parameters(
    denoiser: str, networks: Mapping[str, Any], what: Trainable, keys_and_values: Pattern[str]
) -> dict[str, dict[str, nn.Parameter]]:
    """See `DiffusionModel.trainable`.

    Args:
        denoiser: name of the denoising network. networks: that and the text encoders by name.
        keys_and_values: finds the names of the projections of the prompt to keys and values.
    """
    chosen: dict[str, dict[str, nn.Parameter]] = {}
    for name, network in networks.items():
        text = name != denoiser
        apart = {id(each) for each in network.get_input_embeddings().parameters()} if text else set()
        parameters = {
            # transformers before 5.6 prefixes the names
            own.removeprefix("text_model."): each
            for own, each in network.named_parameters()
            if id(each) not in apart
        }
        if isinstance(network, _ROWS_ALONE):
            chosen[name] = {}
        elif what == "full" or (what == "denoiser" and not text):
            chosen[name] = parameters
        elif what == "cross_attention_kv" and not text:
            chosen[name] = {own: each for own, each in parameters.items() if keys_and_values.search(own)}
        elif what == "lora":
            chosen[name] = {own: each for own, each in parameters.items() if "lora_" in own}
        else:
            chosen[name] = {}
    return chosen


def add_adapters(
    denoiser: str, networks: Mapping[str, nn.Module], rank: int, projections: Sequence[str] | str
) -> None:
    """Put low-rank adapters (LoRA) on the attention projections of a denoiser and its text encoders.

    Args:
        denoiser, networks: see `trainable_parameters`.
        projections: of the denoiser, the ends of their names, or a pattern of whole names.

    Raises:
        MifoError: peft, an optional dependency, is not installed.
    """
    check_package("trainable=lora", "peft", "low_vram")
    from peft import LoraConfig, inject_adapter_in_model

    for name, network in networks.items():
        if isinstance(network, _ROWS_ALONE):
            continue
        # peft's own call: the models' `add_adapter` refuses releases of peft that do this just as well
        targets = projections if name == denoiser else _ADAPTED_TEXT
        targets = targets if isinstance(targets, str) else list(targets)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), network)
        for own, parameter in network.named_parameters():
            if "lora_" in own:  # learns in full precision, whatever that of the base model
                parameter.data = parameter.data.float()
