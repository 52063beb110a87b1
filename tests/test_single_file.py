"""A single file under the original key names is the same model as the folder it was made from."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import load_file, save_file
from tiny import tiny_sdxl_pipeline

from mifo.backbones.loading import load_model, load_outline
from mifo.backbones.settings import ModelSettings
from mifo.errors import MifoError

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE = {
    "down_blocks.": "down.",
    "resnets.": "block.",
    "samplers.0.": "sample.",
    "conv_shortcut": "nin_shortcut",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "to_": "",
}


def replaced(name: str, parts: dict[str, str]) -> str:
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def original_unet(name: str, layers: int, has_attention: list[bool]) -> str:
    """The original name of a tensor of a U-Net with so many residual blocks a level."""
    known = DIFFUSERS_TO_LDM_MAPPING["unet"]
    if name in (direct := known["layers"] | known["addition_embed_type"]):
        return direct[name]
    side, block, kind, number, rest = re.fullmatch(
        r"(\w+?)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.*)", name
    ).groups()
    block, number = int(block or 0), int(number)
    if kind == "resnets":
        rest = replaced(rest, RESNET)
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{1 + has_attention[block]}.{rest}"
    place = block * (layers + 1) + number
    place, group = (place + 1, "input_blocks") if side == "down" else (place, "output_blocks")
    return f"{group}.{place}.{int(kind == 'attentions')}.{rest}"


def original_vae(name: str, levels: int) -> str:
    name = DIFFUSERS_TO_LDM_MAPPING["vae"].get(name, name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    return replaced(name, VAE)


def original_open_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The second text encoder of Stable Diffusion XL, whose queries, keys and values lie in one tensor."""
    known, found = DIFFUSERS_TO_LDM_MAPPING["openclip"], {}
    for name, each in tensors.items():
        if name in known["layers"]:
            found[known["layers"][name]] = each.T.contiguous() if name == "text_projection.weight" else each
        elif ".q_proj." in name:
            joined = torch.cat(
                [tensors[name.replace("q_proj", key)] for key in ("q_proj", "k_proj", "v_proj")]
            )
            found["transformer." + replaced(name, known["transformer"]).replace(".q_proj.", ".in_proj_")] = (
                joined
            )
        elif not re.search(r"\.[kv]_proj\.", name):
            found["transformer." + replaced(name, known["transformer"])] = each
    return found


def single_file(folder: Path, file: Path, half: bool = False) -> Path:
    """Write the weights of a tiny pipeline into one file, and name the text encoder's as on the hub."""
    parts = {each.parent.name: load_file(each) for each in folder.glob("*/*.safetensors")}
    text = {
        "text_model." + name.removeprefix("text_model."): each for name, each in parts["text_encoder"].items()
    }
    save_file(text, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    unet, second = parts["unet"], parts.get("text_encoder_2")
    names = {name.split(".attentions")[0] for name in unet if ".attentions" in name}
    layers = 2 if second else 1
    has_attention = [f"up_blocks.{block}" in names for block in range(3)]
    clip = "conditioner.embedders.0.transformer." if second else "cond_stage_model.transformer."
    whole = {
        **{
            f"model.diffusion_model.{original_unet(name, layers, has_attention)}": each
            for name, each in unet.items()
        },
        **{f"first_stage_model.{original_vae(name, 2)}": each for name, each in parts["vae"].items()},
        **{clip + name: each for name, each in text.items()},
        **{
            f"conditioner.embedders.1.model.{name}": each
            for name, each in original_open_clip(second or {}).items()
        },
    }
    save_file({name: (each.half() if half else each).contiguous() for name, each in whole.items()}, file)
    return file


def networks(model):
    return {**model.networks, "vae": model.vae}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def settings(request, source, tmp_path_factory):
    """A single file, and the folder that it was made from."""
    here = tmp_path_factory.mktemp("single")
    folder = Path(source) if request.param == "sd" else tiny_sdxl_pipeline(here / "sdxl", depths=(1, 2))
    file = single_file(folder, here / "one.safetensors")
    return ModelSettings("one", str(file), config=str(folder))


def test_a_single_file_is_the_model_of_its_folder(settings):
    one, folder = load_model(settings), load_model(ModelSettings("folder", settings.config))
    for part, network in networks(folder).items():
        loaded = networks(one)[part].state_dict()
        assert loaded.keys() == network.state_dict().keys()
        assert all(torch.equal(loaded[name], each) for name, each in network.state_dict().items()), part
        assert not any(each.requires_grad for each in network.parameters())
    assert one.fingerprint == folder.fingerprint and one.vocabulary == folder.vocabulary
    assert one.zero_empty_prompt == folder.zero_empty_prompt
    a, b = (each.encode_prompts(["a photo of a car"]).parts for each in (one, folder))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_what_is_no_checkpoint_or_lacks_its_configurations_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = single_file(Path(source), tmp_path / "one.safetensors", half=True)
    settings = ModelSettings("one", str(file))
    with pytest.raises(
        MifoError, match=r"configurations are not to be had from \S+/\S+; name .* model\.config"
    ):
        load_outline(settings)
    with pytest.raises(MifoError, match=r"from no/folder/here; name"):
        load_outline(replace(settings, config="no/folder/here"))
    with pytest.raises(MifoError, match="for a single file; leave it out"):
        load_outline(ModelSettings("x", source, config=source))
    half = load_model(replace(settings, config=source))
    assert half.unet.dtype == torch.float32
    tensors = load_file(file)
    del tensors["model.diffusion_model.out.0.bias"]
    save_file(tensors, file)
    with pytest.raises(MifoError, match=r"model\.source=.*one\.safetensors could not be loaded"):
        load_model(replace(settings, config=source))
    save_file({"lora": torch.ones(1)}, file)
    with pytest.raises(MifoError, match=r"no whole checkpoint of Stable Diffusion"):
        load_outline(settings)
    file.write_bytes(b"no tensors")
    with pytest.raises(MifoError, match="is a single file, but none of safetensors"):
        load_outline(settings)
