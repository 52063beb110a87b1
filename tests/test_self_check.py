"""A model whose attention ignores masks, or whose maps are others, is not learned on."""

import pytest
import torch
from terms import penalty
from tiny import (
    tiny_flux2_pipeline,
    tiny_pipeline,
    tiny_sd3_pipeline,
    tiny_z_image_pipeline,
    two_instances,
)
from torch.nn import functional as F

from mifo.backbones.attention import attention_probabilities
from mifo.backbones.loading import load_model
from mifo.backbones.settings import ModelSettings
from mifo.errors import MifoError
from mifo.training.fit import learn
from mifo.training.settings import LearningSettings, StageSettings

FAMILIES = {
    "unet": tiny_pipeline,
    "mmdit": tiny_sd3_pipeline,
    "flux2": tiny_flux2_pipeline,
    "z_image": tiny_z_image_pipeline,
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A family's name and a pipeline folder of it."""
    return request.param, FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


def first_step(folder, target, precision="32-true"):
    settings = LearningSettings(semantic=StageSettings(steps=1), finetuning=StageSettings(steps=0))
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "precision": precision}
    model = load_model(ModelSettings("tiny", str(folder)))
    learn(model, two_instances(), settings, penalty(), target, trainer=trainer)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_sound_model_learns(family, tmp_path, precision):
    first_step(family[1], tmp_path, precision)
    assert (tmp_path / "learned" / "learned.json").is_file()


def test_a_backend_that_ignores_a_mask_stops_the_run(family, tmp_path, monkeypatch):
    attend = F.scaled_dot_product_attention

    def broken(query, key, value, attn_mask=None, **options):
        return attend(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)
    with pytest.raises(
        MifoError, match=r"attention at .*att(n1?|ention) .*not obey the rules of boxes \(\d+\.\d% of"
    ):
        first_step(family[1], tmp_path)
    assert not (tmp_path / "learned").exists()


def test_a_backend_that_closes_too_much_stops_the_run(family, tmp_path, monkeypatch):
    attend = F.scaled_dot_product_attention

    def broken(query, key, value, attn_mask=None, **options):
        if attn_mask is not None:
            attn_mask = attn_mask.clone()
            attn_mask[..., key.shape[2] // 8 : key.shape[2] // 3] = -torch.inf
        return attend(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)
    with pytest.raises(MifoError, match="not obey the rules"):
        first_step(family[1], tmp_path)


def test_maps_of_other_queries_stop_the_run(family, tmp_path, monkeypatch):
    room = "unet" if family[0] == "unet" else "joint"
    monkeypatch.setattr(
        f"mifo.backbones.{room}.attention.attention_probabilities",
        lambda *inputs: attention_probabilities(*inputs).flip(2),
    )
    with pytest.raises(
        MifoError, match=r"maps read at .*att(n2?|ention) are not those of its queries and keys"
    ):
        first_step(family[1], tmp_path)
