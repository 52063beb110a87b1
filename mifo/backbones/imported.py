"""Others' words (textual inversion, arXiv 2208.01618) and LoRAs (arXiv 2106.09685), put on a base model."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from transformers import AddedToken, CLIPTokenizer

from mifo.backbones.kinds import Family
from mifo.backbones.latent import LatentModel
from mifo.backbones.settings import ModelSettings
from mifo.backbones.tokens import is_known
from mifo.errors import MifoError
from mifo.files import regular_file
from mifo.tensors import read_tensors

_OF_WEBUI = ("clip_l", "clip_g")  # a word's rows for two encoders, in one file
_DOWN = ("lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight", "_lora.down.weight")


def teach_words(settings: ModelSettings, tokenizers: Sequence[CLIPTokenizer]) -> None:
    """Teach tokenizers, in place, the words of `model.words`.

    Raises:
        MifoError: a word is known already, or is no single word.
    """
    for word in settings.words:
        if not word or word != "".join(word.split()) or is_known(tokenizers[0], word):
            raise MifoError(
                f"model.words has the word '{word}', which the model knows already or which is no single "
                "word; name another, such as mycat."
            )
        for tokenizer in tokenizers:
            tokenizer.add_tokens([AddedToken(word, normalized=False, single_word=True)])


def check_imports(settings: ModelSettings, widths: Sequence[int]) -> None:
    """Check the files of `model.words` and `model.lora` before weights are read.

    Raises:
        MifoError: one cannot be read, or a word's rows do not have these widths of the text encoders.
    """
    for word, given in settings.words.items():
        _rows(word, given, widths)
    if settings.lora is not None:
        try:
            with regular_file(Path(settings.lora).expanduser()):
                pass  # whether it fits, the weights tell
        except MifoError as error:
            raise MifoError(f"model.lora: {error}") from error


@torch.no_grad()
def with_imports(model: LatentModel, family: Family, settings: ModelSettings) -> LatentModel:
    """The model with the rows of `model.words` in its tables and `model.lora` in its weights.

    It counts as a base model of its own: its name and its fingerprint tell what was put on it.

    Raises:
        MifoError: a file is no safetensors file, damaged, or made for another kind of model.
    """
    if not settings.words and settings.lora is None:
        return model
    digest, told = hashlib.sha256(model.fingerprint.encode()), [model.name]
    widths = [encoder.config.hidden_size for encoder in model.text_encoders.values()]
    for word, given in settings.words.items():
        rows = _rows(word, given, widths)
        for tokenizer, encoder, row in zip(model.tokenizers, model.text_encoders.values(), rows, strict=True):
            number, table = tokenizer.convert_tokens_to_ids(word), encoder.get_input_embeddings()
            if number >= table.num_embeddings:
                extended = torch.cat([table.weight, row[None].to(table.weight)])
                encoder.set_input_embeddings(nn.Embedding.from_pretrained(extended))
                encoder.config.vocab_size = len(extended)
            else:
                table.weight[number] = row
            digest.update(row.numpy().tobytes())
        told.append(word)
    if settings.lora is not None:
        file = Path(settings.lora).expanduser()
        tensors = read_tensors(file, None)
        _merge_lora(model, family, file, tensors, settings.lora_scale)
        digest.update(f"{settings.lora_scale}".encode())
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].float().numpy().tobytes())
        told.append(file.name)
    return replace(model, name=" + ".join(told), fingerprint=digest.hexdigest())


def _rows(word: str, given: Any, widths: Sequence[int]) -> list[Tensor]:
    """The row (width,) of a word for each text encoder, which reads rows of such a width."""
    files = [Path(each).expanduser() for each in ([given] if isinstance(given, str) else given)]
    found: list[Tensor] = []
    for file in files:
        tensors = read_tensors(file, None)
        names = _OF_WEBUI[: len(tensors)] if {*tensors} <= {*_OF_WEBUI} else [*tensors]
        found += [tensors[name].float() for name in names]
    for row in found:
        if row.ndim == 2 and len(row) > 1:
            raise MifoError(
                f"model.words.{word}={files[0]} has {len(row)} vectors, but a word of MIFO has "
                "one; name a file of one vector."
            )
    if [row.numel() for row in found] != widths or any(row.shape[-1:] != (row.numel(),) for row in found):
        shapes = ", ".join(str(list(row.shape)) for row in found)
        raise MifoError(
            f"model.words.{word} holds vectors of the shapes {shapes}, but the text encoders of this model "
            f"read widths {', '.join(map(str, widths))}; name a word of the same kind of model."
        )
    return [row.flatten() for row in found]


def _merge_lora(
    model: LatentModel, family: Family, file: Path, tensors: Mapping[str, Tensor], scale: float
) -> None:
    """Add a LoRA, as diffusers, webui or peft name it, to the weights of the model, in place."""
    loader = getattr(diffusers, family.pipeline)
    level = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        unet = {"unet_config": model.denoiser.config} if model.part == "unet" else {}
        read = loader.lora_state_dict(dict(tensors), **unet)
        state, alphas = read if isinstance(read, tuple) else (read, None)
        wanted = {name for name in model.networks if any(key.startswith(f"{name}.") for key in state)}
        if any(key.partition(".")[0] not in model.networks for key in state) or not wanted:
            raise ValueError("it names parts that the model lacks")
        for name in wanted:
            if name == "unet":
                loader.load_lora_into_unet(state, alphas, model.denoiser)
            elif name == model.part:
                loader.load_lora_into_transformer(state, transformer=model.denoiser)
            else:
                loader.load_lora_into_text_encoder(state, alphas, model.networks[name], prefix=name)
    except Exception as error:  # of shapes, names and formats, each with an exception of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MifoError(
            f"model.lora={file} does not fit {model.name} ({reason}); name a LoRA of the same "
            "kind of model, as a safetensors file."
        ) from error
    finally:
        diffusers.logging.set_verbosity(level)
    placed = 0
    for network in model.networks.values():
        for layer in [each for each in network.modules() if hasattr(each, "get_base_layer")]:
            for adapter in layer.active_adapters:
                layer.scale_layer(scale)
                placed += adapter in layer.lora_A
    merge_adapters(model.networks)
    if placed != (there := sum(key.endswith(_DOWN) for key in state)):
        raise MifoError(
            f"model.lora={file} changes {there} layers, of which {model.name} has {placed}; name a LoRA "
            "of the same kind of model."
        )


def merge_adapters(networks: Mapping[str, Any]) -> None:
    """Add low-rank adapters to the weights beside which they stand, in place, and take them out."""
    for network in networks.values():
        for path, layer in list(network.named_modules()):
            if hasattr(layer, "get_base_layer"):  # a layer of peft
                layer.merge()
                network.set_submodule(path, layer.get_base_layer())
        network.requires_grad_(False)
