"""Instances learned apart, in one picture: each one's weights act in its boxes alone."""

import json

import pytest
import torch
from tiny import tiny_pipeline, two_instances

from mifo.backbones.learned import load_learned, save_learned
from mifo.backbones.loading import load_model
from mifo.backbones.settings import ModelSettings
from mifo.data.instance_names import instances_in
from mifo.data.instances import read_instances
from mifo.data.saved_pictures import as_image
from mifo.making.together import Together, put_together
from mifo.method.backbone import Conditioning
from mifo.method.prompts.instances import find_instances
from mifo.method.regions.grids import rasterise_boxes
from mifo.method.regions.rules import SubjectWords, region_rules

BOXES = {"<asset0>": (0.0, 0.0, 0.5, 1.0), "<asset1>": (0.5, 0.5, 1.0, 1.0)}
PROMPT = "a photo of <asset0> and <asset1>"


def result(folder, source, trainable, seed):
    """What was learned of one instance, moved at random."""
    model = load_model(ModelSettings("tiny", source))
    model.add_words(["<asset0>"], ["car"])
    if trainable == "lora":
        model.add_lora(2)
    generator = torch.Generator().manual_seed(seed)
    weights = [each for part in model.trainable(trainable).values() for each in part.values()]
    with torch.no_grad():
        for each in (*model.new_rows.values(), *weights):
            each.add_(0.1 * torch.randn(each.shape, generator=generator))
    photo = folder / "photo"
    photo.mkdir(parents=True)
    instances = two_instances()
    as_image(instances.image[:, : 32 - seed]).save(photo / "img.png")
    as_image(instances.masks[:1, : 32 - seed]).save(photo / "mask0.png")
    save_learned(
        folder / "learned",
        model,
        class_names=["car"],
        initializers=["car"],
        stages={"semantic": 1},
        trainable=trainable,
        lora_rank=2,
        config=f"instances: {{name: photo{seed}, folder: '{photo}', class_names: [car]}}\n",
    )
    return folder / "learned"


def alone(source, folder, prompt):
    """A prediction with one result alone, and its prompt's states."""
    model = load_model(ModelSettings("tiny", source))
    load_learned(folder, model)
    return model, model.encode_prompts([prompt])


def noise(model):
    return torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))


def rules_of(model):
    """The rules of one conditional pass."""
    found = find_instances(PROMPT, list(BOXES), model.words)
    words = SubjectWords.of([found.subjects[name] for name in BOXES], found, torch.device("cpu"))
    sizes = {site.size for site in model.sites}
    boxes = list(BOXES.values())
    return region_rules(lambda size: rasterise_boxes(boxes, size[0])[None], sizes, words, guidance=True)


@torch.no_grad()
def test_words_learned_apart_are_words_of_one_model(source, tmp_path):
    folders = [result(tmp_path / name, source, "tokens", i) for i, name in enumerate("ab")]
    model = put_together(load_model(ModelSettings("tiny", source)), folders)
    assert not isinstance(model, Together) and model.new_words == ("<asset0>", "<asset1>")
    for word, folder in zip(model.new_words, folders, strict=True):
        own, expected = alone(source, folder, "a photo of <asset0>")
        found = model.encode_prompts([f"a photo of {word}"])
        assert torch.equal(found.parts["states"], expected.parts["states"])
        assert own.new_words == ("<asset0>",)


@torch.no_grad()
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_weights_learned_apart_act_in_the_boxes_of_their_instances(source, tmp_path, trainable):
    folders = [result(tmp_path / name, source, trainable, i) for i, name in enumerate("ab")]
    base = load_model(ModelSettings("tiny", source))
    model = put_together(base, folders)
    assert model.members[0] is base and len({id(each.vae) for each in model.members}) == 1
    rules, conditioning = rules_of(model), model.encode_prompts([PROMPT])
    latents, time = noise(base), torch.tensor(500)
    sites = model.default_sites.shapes
    reads = {site: lambda probabilities: probabilities.mean(1) for site in sites}
    found, maps = model.predict(latents, time, conditioning, reads, rules)
    regions = rasterise_boxes(list(BOXES.values()), latents.shape[-1])
    masks = [~regions.any(0), *regions]
    for number, (member, mask) in enumerate(zip(model.members, masks, strict=True)):
        own = Conditioning(
            {k.partition(".")[2]: v for k, v in conditioning.parts.items() if k.startswith(f"{number}.")}
        )
        expected, own_maps = member.predict(latents, time, own, reads, rules)
        torch.testing.assert_close(found[0][:, mask], expected[0][:, mask])
        assert (found[0][:, ~mask] - expected[0][:, ~mask]).abs().max() > 1e-3
        for site in sites:
            at = rasterise_boxes(list(BOXES.values()), site.size[0])
            rows = [~at.any(0), *at][number].flatten()
            torch.testing.assert_close(maps[site][0, rows], own_maps[site][0, rows])
    # a member reads its word as it was learned, first in the prompt, and leaves it where the prompt has it
    for number, word in enumerate(BOXES, 1):
        own, states = alone(source, folders[number - 1], "a photo of <asset0>")
        place = own.places(own.tokenize(["a photo of <asset0>"])[0], "<asset0>")
        here = model.places(model.tokenize([PROMPT])[0], word)
        found = conditioning.parts[f"{number}.states"][0, here]
        torch.testing.assert_close(found, states.parts["states"][0, place])
    # and a member's weights are those of its result, with its own word under the number it has here
    own, states = alone(source, folders[0], "a photo of <asset0>")
    torch.testing.assert_close(
        model.members[1].encode_prompts(["a photo of <asset0>"]).parts["states"], states.parts["states"]
    )
    for (name, one), (_, other) in zip(
        model.members[0].unet.named_parameters(),
        load_model(ModelSettings("tiny", source)).unet.named_parameters(),
        strict=True,
    ):
        assert torch.equal(one, other), name


def test_pictures_of_results_learned_apart_are_made_and_scored(mifo, source, tmp_path, capsys):
    folders = [result(tmp_path / name, source, "lora", i) for i, name in enumerate("ab")]
    given = ["model=local", f"model.source={source}", f"learned=[{folders[0]},{tmp_path / 'b'}]"]
    few = ["synthesis.steps=3", "guidance.guided_steps=1", "guidance.shapes_from=2", "guidance.restarts=1"]
    assert mifo("synthesize", *given, *few, "hydra.run.dir=S") == 0
    assert "<asset1> is <asset0>" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "S" / "pictures" / "pictures.json").read_text())) == 1
    joined = read_instances(instances_in(tmp_path / "S" / "pictures" / "instances.yaml"))
    assert joined.class_names == ("car", "car") and joined.image.shape == (3, 32, 64)
    assert joined.masks[1, :, :32].max() == 0 and joined.masks[1, :, 32:].max() == 1
    assert mifo("evaluate", "pictures=S") == 0
    for more, words in (
        (["layout=plain"], "<asset0> has no box"),
        (["guidance=none"], "guidance.masked is false"),
        ([f"learned=[{folders[0]},nowhere]"], "nowhere"),
        (["learned=[]"], "learned=[] names no folder"),
    ):
        assert mifo("synthesize", *given, *more) == 2
        assert words in capsys.readouterr().err


def test_results_of_different_base_models_are_refused(mifo, source, tmp_path, capsys):
    other = str(tiny_pipeline(tmp_path / "other", seed=1))
    folders = [result(tmp_path / "a", source, "tokens", 0), result(tmp_path / "b", other, "tokens", 1)]
    given = ["model=local", f"model.source={source}", f"learned=[{folders[0]},{folders[1]}]"]
    assert mifo("synthesize", *given) == 2
    assert "was learned on tiny" in capsys.readouterr().err
