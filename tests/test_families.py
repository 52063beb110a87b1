"""The recipe of docs/extending.md for a model family, word for word."""

import json
import re
import shutil
from pathlib import Path

import torch

from mifo.backbones import kinds
from mifo.backbones.loading import load_model, load_outline
from mifo.backbones.settings import ModelSettings

EXTENDING = Path(__file__).parents[1] / "docs" / "extending.md"


@torch.no_grad()
def test_the_recipe_adds_a_family(source, tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "FAMILIES", kinds.FAMILIES.copy())
    section = EXTENDING.read_text().split("## A model family")[1].split("\n## ")[0]
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], {"__name__": "recipe"})
    folder = shutil.copytree(source, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "ClipSkipPipeline"}))
    settings = ModelSettings("skip", str(folder))
    assert type(load_outline(settings)).__name__ == "ClipSkipModel"
    model = load_model(settings)
    plain = load_model(ModelSettings("tiny", source))
    prompts = ["a photo of a red car"]
    states = plain.text_encoder(plain.tokenize(prompts)[:, 0], output_hidden_states=True).hidden_states
    expected = plain.text_encoder.final_layer_norm(states[1])  # behind the first of two layers
    assert torch.equal(model.encode_prompts(prompts).parts["states"], expected)
    assert not torch.equal(plain.encode_prompts(prompts).parts["states"], expected)
    assert model.identity()["clip_skip"] == "2" and model.fingerprint == plain.fingerprint
