"""Names of files and tensors, as diffusers and as webui (AUTOMATIC1111, ComfyUI) have them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mifo.errors import MifoError
from mifo.exporting.low_rank import LowRank

# of a text encoder, diffusers and webui read adapters of these layers alone
_OF_TEXT = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")
_OF_WEBUI = {"unet": "lora_unet", "text_encoder_2": "lora_te2"}


def lora_name(form: str) -> str:
    """The file of a LoRA: diffusers looks for its name, webui shows it."""
    return "pytorch_lora_weights.safetensors" if form == "diffusers" else "mifo.safetensors"


def word_files(
    rows: Mapping[str, Tensor], words: Sequence[str], form: str
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Files of textual inversion (arXiv 2208.01618).

    Args:
        rows: (N, width) of N words, by text encoder. words: what they are called.

    Returns:
        By text encoder and name of a file its tensors: in the form "diffusers" the row (1, width) of a word
        under the word. In "webui" the first encoder's files hold the rows of all, clip_l and clip_g of two;
        a file's name is the word.
    """
    stems = [word.strip("<>") for word in words]
    own = {network: each.detach().float().split(1) for network, each in rows.items()}
    if form == "webui":
        names = ["emb_params"] if len(rows) == 1 else ["clip_l", "clip_g"]
        both = {
            f"{stem}.safetensors": {name: each[i] for name, each in zip(names, own.values(), strict=True)}
            for i, stem in enumerate(stems)
        }
        return {next(iter(rows)): both}
    endings = {network: "" if network == "text_encoder" else f".{network}" for network in rows}
    return {
        network: {
            f"{stem}{endings[network]}.safetensors": {word: row}
            for stem, word, row in zip(stems, words, each, strict=True)
        }
        for network, each in own.items()
    }


def holds(form: str, network: str, path: str) -> bool:
    """Whether a LoRA of this form has a place for the matrix of a layer."""
    if network.startswith("text_encoder"):
        return path.endswith(_OF_TEXT)
    # layers outside of the blocks, as those of the time, have names in webui that diffusers reads in part
    return form == "diffusers" or "blocks." in path or "mid_block." in path


def lora_tensors(found: LowRank, form: str) -> dict[str, Tensor]:
    """The tensors of a LoRA's file.

    Raises:
        MifoError: webui has no names for a network.
    """
    tensors: dict[str, Tensor] = {}
    # readers multiply by alpha / rank; diffusers gives an alpha to other layers where ranks differ
    rank = max((len(a) for a, _ in found.factors.values()), default=0)
    several = any(network == "text_encoder_2" for network, _ in found.factors)
    for (network, path), (a, b) in found.factors.items():
        if network.startswith("text_encoder"):  # the name that older transformers give the model in its parts
            path = f"text_model.{path.removeprefix('text_model.')}"
        if form == "diffusers":
            tensors |= {f"{network}.{path}.lora_A.weight": a, f"{network}.{path}.lora_B.weight": b}
            continue
        prefix = {"text_encoder": "lora_te1" if several else "lora_te", **_OF_WEBUI}.get(network)
        if prefix is None:
            raise MifoError(
                f"format=webui has no names for the {network} of this model; take format=diffusers."
            )
        name = f"{prefix}_{path.replace('.', '_')}"
        tensors |= {
            f"{name}.lora_down.weight": F.pad(a, (0, 0) * (a.ndim - 1) + (0, rank - len(a))),
            f"{name}.lora_up.weight": F.pad(b, (0, 0) * (b.ndim - 2) + (0, rank - len(a))),
            f"{name}.alpha": torch.tensor(float(rank), dtype=a.dtype),
        }
    return tensors
