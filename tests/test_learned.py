"""What was learned survives saving and loading exactly, and goes only where it belongs."""

import json
import shutil

import pytest
import torch
from tiny import tiny_pipeline

from mifo.backbones.learned import load_learned, read_learned, save_learned
from mifo.backbones.loading import load_model
from mifo.backbones.settings import ModelSettings
from mifo.errors import MifoError

TOKENS = ["<asset0>", "<asset1>"]


def learned_model(source, trainable):
    """A model whose learned weights are moved at random, as learning would."""
    model = load_model(ModelSettings("tiny", source))
    model.add_words(TOKENS, ["car", None])
    if trainable == "lora":
        model.add_lora(2)
    with torch.no_grad():
        for each in (
            rows_of(model),
            *(each for part in model.trainable(trainable).values() for each in part.values()),
        ):
            each.add_(0.1 * torch.randn(each.shape, generator=torch.Generator().manual_seed(0)))
    return model


def rows_of(model):
    """The new rows of the one text encoder."""
    return model.new_rows["text_encoder"]


def save(folder, model, trainable, half=False):
    return save_learned(
        folder,
        model,
        class_names=["car", "cat"],
        initializers=["car", None],
        stages={"semantic": 4, "finetuning": 2},
        trainable=trainable,
        lora_rank=2,
        half=half,
        config="seed: 1\n",
    )


def states_of(model):
    return model.encode_prompts(["a red cat"]).parts["states"]


def predict(model):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        conditioning = model.encode_prompts(["a photo of <asset1> and <asset0>"])
        return model.predict(latents, torch.tensor(5), conditioning)[0]


@pytest.mark.parametrize("trainable", ["tokens", "cross_attention_kv", "denoiser", "full", "lora"])
def test_round_trip_is_exact(source, tmp_path, trainable):
    if trainable == "lora":
        pytest.importorskip("peft")
    model = learned_model(source, trainable)
    saved = save(tmp_path / "learned", model, trainable)
    files = {file.name for file in (tmp_path / "learned").iterdir()}
    unet_alone = trainable in ("cross_attention_kv", "denoiser")
    weights = {"unet.safetensors"} if unet_alone else {"unet.safetensors", "text_encoder.safetensors"}
    weights = set() if trainable == "tokens" else weights
    assert files == {"learned.json", "config.yaml", "tokens.safetensors"} | weights
    assert (tmp_path / "learned" / "config.yaml").read_text() == "seed: 1\n"
    loaded = load_model(ModelSettings("tiny", source))
    untouched = states_of(loaded)
    assert load_learned(tmp_path / "learned", loaded) == saved
    assert torch.equal(rows_of(loaded), rows_of(model))
    assert torch.equal(predict(loaded), predict(model))
    assert torch.equal(states_of(loaded), untouched) == (trainable == "tokens" or unet_alone)


def test_half_precision_rounds_weights_and_not_rows(source, tmp_path):
    model = learned_model(source, "full")
    save(tmp_path / "learned", model, "full", half=True)
    loaded = load_model(ModelSettings("tiny", source))
    load_learned(tmp_path / "learned", loaded)
    assert torch.equal(rows_of(loaded), rows_of(model))
    assert torch.equal(loaded.unet.conv_in.weight, model.unet.conv_in.weight.half().float())


def test_nothing_is_replaced(source, tmp_path):
    model = learned_model(source, "tokens")
    save(tmp_path / "learned", model, "tokens")
    before = (tmp_path / "learned" / "tokens.safetensors").read_bytes()
    with pytest.raises(MifoError, match="exists already"):
        save(tmp_path / "learned", learned_model(source, "cross_attention_kv"), "cross_attention_kv")
    assert (tmp_path / "learned" / "tokens.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["learned"]


def test_another_base_model_is_refused_by_name(source, tmp_path):
    save(tmp_path / "learned", learned_model(source, "tokens"), "tokens")
    other = load_model(ModelSettings("another", str(tiny_pipeline(tmp_path / "other", seed=1))))
    with pytest.raises(MifoError, match=r"learned on tiny .* not on another"):
        load_learned(tmp_path / "learned", other)


@pytest.mark.parametrize(
    ("file", "key", "value", "told"),
    [
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction", "prediction_type=epsilon"),
        ("scheduler/scheduler_config.json", "beta_end", 0.02, "beta_end 0.012"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 500, "num_train_timesteps 1000"),
        ("vae/config.json", "scaling_factor", 0.5, "vae_scaling_factor=0.18215"),
    ],
)
def test_a_base_model_that_changed_under_a_result_is_refused_with_both_values(
    source, tmp_path, file, key, value, told
):
    save(tmp_path / "learned", learned_model(source, "tokens"), "tokens")
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    (changed / file).write_text(json.dumps(json.loads((changed / file).read_text()) | {key: value}))
    with pytest.raises(MifoError, match=rf"{told}.* but .*{key}.{value}.* put that back"):
        load_learned(tmp_path / "learned", load_model(ModelSettings("tiny", str(changed))))


def test_another_vocabulary_is_refused_and_sampling_settings_are_not_compared(source, tmp_path):
    save(tmp_path / "learned", learned_model(source, "tokens"), "tokens")
    model = load_model(ModelSettings("tiny", source))
    model.noise_scheduler.register_to_config(steps_offset=0, timestep_spacing="trailing")
    load_learned(tmp_path / "learned", model)
    words = tmp_path / "words"
    shutil.copytree(source, words)
    content = json.loads((words / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["red</w>"], vocabulary["cat</w>"] = vocabulary["cat</w>"], vocabulary["red</w>"]
    (words / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MifoError, match=r"vocabulary=\w+, but .* vocabulary="):
        load_learned(tmp_path / "learned", load_model(ModelSettings("tiny", str(words))))


def test_results_of_earlier_versions_load_and_their_prediction_type_counts(source, tmp_path):
    save(tmp_path / "learned", learned_model(source, "tokens"), "tokens")
    file = tmp_path / "learned" / "learned.json"
    content = json.loads(file.read_text())
    content["base"] = {key: content["base"][key] for key in ("name", "source", "revision", "fingerprint")}
    file.write_text(json.dumps(content))
    load_learned(tmp_path / "learned", load_model(ModelSettings("tiny", source)))
    file.write_text(json.dumps(content | {"prediction_type": "v_prediction"}))
    with pytest.raises(MifoError, match=r"prediction_type=v_prediction, but .*prediction_type=epsilon"):
        load_learned(tmp_path / "learned", load_model(ModelSettings("tiny", source)))


def test_damaged_and_foreign_folders_are_refused(source, tmp_path):
    save(tmp_path / "learned", learned_model(source, "cross_attention_kv"), "cross_attention_kv")
    model = load_model(ModelSettings("tiny", source))
    with pytest.raises(MifoError, match="holds no learned result"):
        load_learned(tmp_path, model)
    (tmp_path / "learned" / "unet.safetensors").write_bytes(b"damaged")
    with pytest.raises(MifoError, match=r"unet\.safetensors is damaged: its checksum"):
        load_learned(tmp_path / "learned", model)
    file = tmp_path / "learned" / "learned.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"tokens": ["<asset0>", "é"]}))
    with pytest.raises(MifoError, match=r"learned\.json is damaged: tokens holds"):
        load_learned(tmp_path / "learned", model)
    file.write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(MifoError, match="format 99"):
        load_learned(tmp_path / "learned", model)


@pytest.mark.parametrize(
    ("old", "new"),
    [("tokens", "tokens"), ("kv", "cross_attention_kv"), ("unet", "denoiser"), ("full", "full")],
)
def test_a_result_from_before_the_house_was_rebuilt_is_read(source, tmp_path, old, new):
    model = learned_model(source, new)
    saved = save(tmp_path / "learned", model, new)
    file = tmp_path / "learned" / "learned.json"
    content = json.loads(file.read_text())
    del content["trainable"]
    file.write_text(json.dumps(content | {"learn": old}))
    assert read_learned(tmp_path / "learned") == saved
    loaded = load_model(ModelSettings("tiny", source))
    load_learned(tmp_path / "learned", loaded)
    assert torch.equal(predict(loaded), predict(model))
