"""Metrics on pictures whose truth is known: squares of plain colours, seen by one that knows colour only."""

import inspect
import json
import math
import os
import sys
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from tiny import instances_of, tiny_tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from mifo.commands.evaluate import other_instances, pictures_folder, print_scores, recorded_instances, scored
from mifo.commands.synthesize import learned_folder
from mifo.config.checks import check
from mifo.config.compose import compose, settings_of
from mifo.config.location import conf_folder
from mifo.data.saved_pictures import Picture, read_pictures, save_pictures
from mifo.errors import MifoError
from mifo.metrics.box_adherence import BoxAdherence, find_instance
from mifo.metrics.class_accuracy import ClassAccuracy, class_texts, whole_window
from mifo.metrics.crops import crop_box, mask_box, pad_square, reference_crops
from mifo.metrics.evaluation import Evaluation, PictureEvaluator
from mifo.metrics.evaluators import load_image_encoder, load_image_text_encoder
from mifo.metrics.instance import Identification, InstanceConsistency, Leakage, leakage_matrix
from mifo.metrics.presence import match
from mifo.metrics.prompt_similarity import PromptSimilarity, name_classes
from mifo.metrics.scores import Evaluator, Score, score_table
from mifo.metrics.settings import ClassWords, Fit, ImageSettings, ImageTextSettings, MetricsSettings
from mifo.world.scenes import redraw_scene, render_scene
from mifo.world.spec import SceneSpec, ThingSpec

RED, GREEN, BLUE = torch.eye(3)
GREY = torch.full((3,), 1e-4)  # of texts that name no colour
TOKENS = ["<asset0>", "<asset1>", "<asset2>"]
BOXES = [(0.0, 0.0, 0.25, 0.25), (0.5, 0.0, 0.75, 0.25), (0.0, 0.5, 0.25, 0.75)]


class ColourEncoder:
    """Features are the mean colour; texts are encoded by the colour they name."""

    evaluator = Evaluator("colour", "0" * 12)

    def encode_images(self, images):
        return torch.stack([image.mean(dim=(1, 2)) for image in images])

    def encode_texts(self, texts):
        colours = {"red": RED, "green": GREEN, "blue": BLUE}
        return torch.stack(
            [sum((colours[word] for word in text.split() if word in colours), GREY) for text in texts]
        )

    def warnings(self, texts):
        return []


def draw(*colours, size=32):
    """A black picture with a square of each colour in BOXES."""
    image = torch.zeros(3, size, size)
    for colour, (x0, y0, x1, y1) in zip(colours, BOXES, strict=False):
        rows, columns = (
            slice(round(y0 * size), round(y1 * size)),
            slice(round(x0 * size), round(x1 * size)),
        )
        image[:, rows, columns] = colour.view(3, 1, 1)
    return image


def masks(size=32):
    return torch.stack([draw(*[torch.zeros(3)] * i, torch.ones(3), size=size)[0] for i in range(3)])


def evaluate(*images, boxes=True, class_names=("red", "green", "blue")):
    prompt = "a photo of <asset0> and <asset1> and <asset2>"
    pictures = [
        Picture(image, prompt, dict(zip(TOKENS, BOXES, strict=True)) if boxes else {}) for image in images
    ]
    evaluator = PictureEvaluator(ColourEncoder(), ColourEncoder(), MetricsSettings(windows=5))
    return evaluator.evaluate(pictures, instances_of(draw(RED, GREEN, BLUE), masks(), class_names))


def values(evaluation):
    return {score.metric: score.value for score in evaluation.scores}


def test_a_perfect_picture_and_a_swapped_one_score_as_such():
    perfect = values(evaluate(draw(RED, GREEN, BLUE)))
    assert perfect == pytest.approx(
        {
            "editability": 1,
            "instance_consistency": 1,
            "instance_consistency_clip": 1,
            "identification": 1,
            "leakage": 0,
            "class_accuracy": 1,
            "class_accuracy_whole": 1,
            "box_adherence": 1,
            "missing": 0,
            "twice": 0,
            "picture_similarity": 3**-0.5,  # as the mean colour has a third of each
        },
        abs=1e-6,
    )
    swapped = evaluate(draw(GREEN, RED, BLUE))
    assert values(swapped)["identification"] == pytest.approx(1 / 3)
    assert values(swapped)["leakage"] == pytest.approx(2 / 3)
    assert values(swapped)["class_accuracy"] == pytest.approx(1 / 3)
    assert values(swapped)["class_accuracy_whole"] == pytest.approx(1 / 3)  # another's place does not count
    assert values(swapped)["instance_consistency"] == pytest.approx(1 / 3)
    assert values(swapped)["editability"] == pytest.approx(1)
    torch.testing.assert_close(
        torch.tensor(swapped.leakage_matrix), torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])
    )


def test_mean_scores_are_those_of_the_crops():
    evaluation = evaluate(draw(RED, GREEN, BLUE), draw(GREEN, RED, BLUE))
    assert [row["identification"] for row in evaluation.pictures] == pytest.approx([1, 1 / 3])
    assert values(evaluation)["identification"] == pytest.approx(2 / 3)
    assert {score.metric: score.count for score in evaluation.scores}["leakage"] == 6


def test_a_thing_that_leaves_its_box_is_judged_whole():
    picture = draw(RED, GREEN, BLUE)
    x0, y0, x1, y1 = (round(edge * 32) for edge in BOXES[0])
    picture[:, y0:y1, x0 : x0 + (x1 - x0) * 2 // 3] = GREEN.view(3, 1, 1)
    picture[:, y0:y1, x0 + (x1 - x0) * 2 // 3 : x1 + (x1 - x0)] = RED.view(3, 1, 1)
    found = evaluate(picture).pictures[0]
    assert found["class_accuracy"] == pytest.approx(2 / 3) and found["class_accuracy_whole"] == 1
    assert whole_window((0.0, 0.0, 0.4, 0.4), (0.2, 0.1, 0.6, 0.5)) == (0.0, 0.0, 0.6, 0.5)
    for apart in ((0.4, 0.0, 0.8, 0.4), (math.nan,) * 4):
        assert whole_window((0.0, 0.0, 0.4, 0.4), apart) == (0.0, 0.0, 0.4, 0.4)


def test_an_instance_without_a_class_has_no_class_accuracy():
    some = evaluate(draw(RED, GREEN, RED), class_names=("red", None, "blue"))
    assert values(some)["class_accuracy"] == 0.5  # of two: red is red, blue is drawn red
    assert {score.metric: score.count for score in some.scores}["class_accuracy"] == 2
    assert "class_accuracy" not in values(evaluate(draw(RED, GREEN, BLUE), class_names=(None,) * 3))


def test_an_instance_is_missing_or_twice_by_pictures_and_a_swap_is_neither():
    whole, swap = draw(RED, GREEN, BLUE), draw(GREEN, BLUE, RED)
    lost, copied = draw(RED, GREEN), draw(RED, RED, BLUE)
    found = evaluate(whole, swap, lost, copied)
    assert [row["missing"] for row in found.pictures] == [0, 0, 1, 1]
    assert [row["twice"] for row in found.pictures] == [0, 0, 0, 1]
    assert values(found)["missing"] == 0.5 and values(found)["twice"] == 0.25
    assert {score.metric: score.count for score in found.scores}["missing"] == 4
    assert "missing" not in values(evaluate(whole, boxes=False))


def test_crops_are_matched_to_instances_one_to_one_as_no_other_way_is_better():
    torch.manual_seed(0)
    for _ in range(20):
        cosines = torch.rand(4, 4)
        best = max(permutations(range(4)), key=lambda order: sum(cosines[i, j] for i, j in enumerate(order)))
        assert match(cosines).tolist() == list(best)


def test_leakage_does_not_blame_references_that_resemble_each_other():
    references = F.normalize(torch.tensor([[1.0, 0.05, 0], [1, 0, 0.05]]), dim=-1)  # cosine 0.9975
    own = torch.arange(2)
    for crops, expected in (
        (references, 0.0),
        (references.flip(0), 1.0),
        (references.mean(0).repeat(2, 1), 0.5),
    ):
        metric = Leakage()
        metric.update(crops, references, own)
        assert metric.compute() == pytest.approx(expected, abs=1e-3)


def test_leakage_ignores_what_resembles_no_reference():
    """A scene around the instance (orthogonal to all references) lowers consistency, not identity."""
    references = torch.eye(4)[:2]
    crops = 0.6 * references + torch.tensor([0, 0, 0.8, 0])
    own = torch.arange(2)
    leakage, consistency = Leakage(), InstanceConsistency()
    leakage.update(crops, references, own)
    consistency.update(crops, references, own)
    assert leakage.compute() == pytest.approx(0, abs=1e-6)
    assert consistency.compute() == pytest.approx(0.6)
    blank = Leakage()
    blank.update(torch.eye(4)[3:].repeat(2, 1), references, own)
    assert blank.compute() == pytest.approx(0.5)  # resembles none: no credit


def test_leakage_matrix_has_no_figure_where_nothing_was_drawn():
    matrix = leakage_matrix(torch.eye(3)[:1], torch.eye(3), torch.tensor([0]))
    assert matrix[0].tolist() == [1, 0, 0] and matrix[1:].isnan().all()


def test_metrics_say_their_direction():
    directions = {
        metric: metric.higher_is_better
        for metric in (PromptSimilarity, InstanceConsistency, Identification, ClassAccuracy, BoxAdherence)
    }
    assert all(directions.values()) and Leakage.higher_is_better is False


def test_class_accuracy_chooses_among_the_words_of_the_list_and_the_instances_own():
    texts, places = class_texts(ClassWords.coco, ["cat", None, "wooden owl"])
    assert len(texts) == 80 + 1 and len(set(texts)) == 81
    assert texts[places[0]] == "a photo of a cat" and texts[places[2]] == "a photo of a wooden owl"
    assert places[1] is None and "a photo of an apple" in texts
    with pytest.raises(MifoError, match=r"metrics\.class_words"):
        settings_of(compose("run", ["metrics.class_words=imagenet", "paths.output=here"]))


def test_a_boat_drawn_as_a_balloon_is_a_lost_class():
    """By the embedded evaluators, on drawings of which nothing else can be wrong."""
    boats = SceneSpec([ThingSpec("boat", "red"), ThingSpec("boat", "blue")], "at the beach", 3)
    changed = SceneSpec([ThingSpec("boat", "red"), ThingSpec("balloon", "blue")], "at the beach", 3)
    boxes = dict(zip(TOKENS, [(0.05, 0.3, 0.45, 0.7), (0.55, 0.3, 0.95, 0.7)], strict=False))
    evaluator = PictureEvaluator.from_settings(MetricsSettings(fit=Fit.stretch))
    source = render_scene(boats)
    scores = [
        values(
            evaluator.evaluate(
                [
                    Picture(
                        redraw_scene(spec, [0, 1], list(boxes.values()), "in the snow", 0).image,
                        "a photo of <asset0> and <asset1> in the snow",
                        boxes,
                    )
                ],
                instances_of(source.image, source.masks.float(), ("boat", "boat")),
            )
        )
        for spec in (boats, changed)
    ]
    assert [score["class_accuracy"] for score in scores] == [1, 0.5]
    assert scores[1]["leakage"] < 0.2  # which does not see it


def test_an_instance_outside_its_box_is_found_where_it_is():
    image = torch.zeros(3, 32, 32)
    image[0, 16:24, 24:32] = 1
    found = find_instance(image, RED, BOXES[0], ColourEncoder(), windows=4)
    assert found == pytest.approx((0.75, 0.5, 1, 0.75))
    adherence = BoxAdherence()
    adherence.update(torch.tensor([found, BOXES[0]]), torch.tensor([BOXES[0], BOXES[0]]))
    assert adherence.compute() == pytest.approx(0.5)


def test_without_boxes_a_lone_instance_is_compared_with_the_whole_picture():
    evaluator = PictureEvaluator(ColourEncoder(), ColourEncoder())
    source = instances_of(draw(RED, GREEN, BLUE), masks(), ("red", "green", "blue"))
    plain = Picture(RED.view(3, 1, 1).expand(3, 8, 8), "a photo of <asset0>")
    assert values(evaluator.evaluate([plain], source))["instance_consistency"] == pytest.approx(1)
    assert values(evaluate(draw(RED, GREEN, BLUE), boxes=False)).keys() == {"editability"}


def test_crops_follow_pythons_rounding_and_are_squared_on_black():
    image = torch.arange(1.0, 65).view(1, 8, 8)
    crop = pad_square(crop_box(image, (0.0625, 0.25, 0.3125, 1.0)))  # columns round(0.5)=0 … round(2.5)=2
    assert crop.shape == (1, 6, 6)
    torch.testing.assert_close(crop[:, :, 2:4], image[:, 2:, :2])
    assert crop[:, :, :2].sum() == crop[:, :, 4:].sum() == 0
    assert crop_box(image, (0.99, 0.99, 1.0, 1.0)).shape == (1, 1, 1)


def test_references_are_masked_on_black():
    image, mask = torch.ones(3, 8, 8), torch.zeros(1, 8, 8)
    mask[0, 2:6, 4:6] = 1
    mask[0, 2, 4] = 0
    assert mask_box(mask[0]) == (0.5, 0.25, 0.75, 0.75)
    (crop,) = reference_crops(image, mask)
    assert crop.shape == (3, 4, 2) and crop.sum() == 3 * 7
    with pytest.raises(MifoError, match="no pixel"):
        mask_box(torch.zeros(4, 4))


def test_tokens_are_replaced_by_class_names():
    tokens = [f"<asset{i}>" for i in range(11)]
    names = ["car"] * 10 + [None]
    assert name_classes("a photo of <asset1> and <asset10>", tokens, names) == "a photo of car and object"


def test_scores_of_different_evaluators_never_share_a_table():
    dino, other = Evaluator("dino", "a1"), Evaluator("dino", "b2")
    mine = Score("leakage", 0.1, False, dino, "standard")
    assert score_table({"a": [mine], "b": [mine]}) == {"a": {"leakage": 0.1}, "b": {"leakage": 0.1}}
    for stranger in (
        Score("leakage", 0.2, False, other, "standard"),
        Score("leakage", 0.2, False, dino, "mine"),
    ):
        with pytest.raises(MifoError, match="same `metrics`"):
            score_table({"a": [mine], "b": [stranger]})


def test_pictures_and_evaluations_survive_the_disk(tmp_path):
    levels = torch.arange(256).repeat(3, 1, 1) / 255
    pictures = [Picture(levels, "a photo of <asset0>", {"<asset0>": BOXES[0]}, 7)]
    (read,) = read_pictures(save_pictures(tmp_path / "pictures", pictures))
    torch.testing.assert_close(read.image, pictures[0].image)
    assert (read.prompt, read.boxes, read.seed) == ("a photo of <asset0>", {"<asset0>": BOXES[0]}, 7)
    with pytest.raises(MifoError, match="already holds"):
        save_pictures(tmp_path / "pictures", pictures)
    with pytest.raises(MifoError, match="does not exist"):
        read_pictures(tmp_path / "nothing")
    evaluation = evaluate(draw(RED, GREEN, BLUE))
    evaluation.save(tmp_path / "scores.json")
    assert Evaluation.read(tmp_path / "scores.json") == evaluation
    with pytest.raises(MifoError, match="already exists"):
        evaluation.save(tmp_path / "scores.json")


ROW = {"file": "000.png", "prompt": "a photo", "boxes": {}, "seed": 7}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("[", r"pictures\.json is damaged: it is not JSON"),
        ({"a": 1}, "holds no list"),
        ([[]], "holds no object"),
        ([ROW | {"file": "../000.png"}], r"names '\.\./000\.png', which is no file beside it"),
        ([ROW | {"file": "/etc/hostname"}], "names '/etc/hostname'"),
        ([ROW | {"file": ".."}], "is no regular file|Is a directory"),
        ([ROW | {"file": "link.png"}], "names 'link.png'"),
        ([ROW | {"file": "a\0b.png"}], "cannot be read"),
        ([ROW | {"file": "gone.png"}], r"gone\.png cannot be read"),
        ([ROW | {"file": "half.png"}], r"half\.png can not be read"),
        ([ROW | {"file": "pipe.png"}], r"pipe\.png is no regular file"),
        ([ROW | {"prompt": 3}], "prompt holds '3'"),
        ([ROW | {"seed": "7"}], "seed holds '7'"),
        ([ROW | {"boxes": [1]}], "boxes holds"),
        ([ROW | {"boxes": {"<asset0>": [0, 0, 1]}}], r"pictures\.json is damaged: .*needs four numbers"),
        ([ROW | {"boxes": {"<asset0>": [0, 0, 1, 7]}}], r"pictures\.json is damaged: .*leaves the picture"),
        ([{"file": "000.png"}], "lacks the key boxes"),
        ([ROW | {"target": 1}], "unknown key 'target'"),
    ],
)
def test_damaged_picture_folders_end_in_a_sentence(tmp_path, rows, sentence):
    folder = save_pictures(tmp_path / "pictures", [Picture(torch.zeros(3, 8, 8), "a photo", {}, 7)])
    content = (folder / "000.png").read_bytes()
    (folder / "half.png").write_bytes(content[:-30])
    (tmp_path / "outside.png").write_bytes(content)
    (folder / "link.png").symlink_to("../outside.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "pictures.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    with pytest.raises(MifoError, match=sentence):
        read_pictures(folder)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ("name: [", r"instances\.yaml is damaged"),
        ("- a", r"instances\.yaml is damaged"),
        ("name: a\nunknown: 3", r"instances\.yaml is damaged.*unknown"),
        ("folder: ${nowhere}", r"instances\.yaml holds \$\{…\}"),
        ("class_names: {a: b}", r"instances\.yaml is damaged"),
        ("initializers: [{a: b}]", r"instances\.yaml is damaged"),
        ("a: &a [x]\nname: *a", r"instances\.yaml holds a YAML alias"),
    ],
)
def test_damaged_records_of_instances_end_in_a_sentence(tmp_path, record, sentence):
    (tmp_path / "instances.yaml").write_text(record)
    with pytest.raises(MifoError, match=sentence):
        recorded_instances(tmp_path)


def test_a_file_is_no_folder_of_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(MifoError, match=r"pictures=.*a\.png is a file, not a folder"):
        pictures_folder(str(tmp_path / "a.png"))
    with pytest.raises(MifoError, match=r"learned=.*a\.png is a file, not a folder"):
        learned_folder(str(tmp_path / "a.png"))


def test_a_kill_while_scores_are_written_leaves_no_half_file(tmp_path, monkeypatch):
    evaluation, path = evaluate(draw(RED, GREEN, BLUE)), tmp_path / "scores.json"

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", kill)
        evaluation.save(path)
    assert not path.exists()
    path.write_text('{"scores": [')
    evaluation.save(path)
    assert Evaluation.read(path) == evaluation


def save_clip(folder, seed=0):
    tokenizer = tiny_tokenizer(16)
    tokenizer.save_pretrained(folder)
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 8, "head_width": 4, "patch_size": 8},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": len(tokenizer),
            "width": 8,
            "heads": 2,
            "layers": 1,
            "hf_tokenizer_name": "local",
        },
    }
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return model


def test_pictures_of_several_sizes_are_encoded_as_each_by_itself(tmp_path):
    save_clip(tmp_path)
    generator = torch.Generator().manual_seed(0)
    sizes = ((16, 16), (9, 20), (16, 16), (20, 9), (9, 20))
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    for fit in Fit:
        encoder = load_image_text_encoder(ImageTextSettings(f"local-dir:{tmp_path}"), 2, fit)
        alone = torch.cat([encoder.encode_images([image]) for image in images])
        torch.testing.assert_close(encoder.encode_images(images), alone, rtol=1e-4, atol=1e-5)


def test_open_clip_folder_is_loaded_with_its_tokenizer(tmp_path):
    model = save_clip(tmp_path).eval()
    encoder = load_image_text_encoder(ImageTextSettings(f"local-dir:{tmp_path}"), batch_size=2)
    images = [torch.rand(3, 16, 16) for _ in range(3)]
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    with torch.inference_mode():
        expected = model.encode_image((torch.stack(images) - mean) / std)
    torch.testing.assert_close(encoder.encode_images(images), expected, rtol=1e-4, atol=1e-5)
    red, blue, again = encoder.encode_texts(["a red car", "a blue car", "a red car"])
    torch.testing.assert_close(red, again)
    assert not torch.allclose(red, blue)
    (tmp_path / "other").mkdir()
    save_clip(tmp_path / "other", seed=1)
    other = load_image_text_encoder(ImageTextSettings(f"local-dir:{tmp_path / 'other'}"))
    assert encoder.evaluator.weights != other.evaluator.weights


def test_a_prompt_that_the_evaluator_cuts_is_warned_of_once(tmp_path):
    save_clip(tmp_path)  # of 16 tokens, with start and end
    encoder = load_image_text_encoder(ImageTextSettings(f"local-dir:{tmp_path}"))
    fits, longer = ("a red car" + " red" * extra for extra in (11, 12))
    features = encoder.encode_texts([fits, longer, f"{longer} cat", longer])
    assert torch.equal(features[1], features[2])
    assert encoder.warnings([fits, longer, f"{longer} cat", longer]) == [
        f"{tmp_path.name} reads 16 tokens and leaves out the end of the prompt {text!r}, which its scores do "
        "not tell."
        for text in (longer, f"{longer} cat")
    ]
    encoder.tokenizer = open_clip.get_tokenizer("ViT-B-32")
    (warning,) = encoder.warnings(["very " * 75, "very " * 76])
    assert f"{'very ' * 76!r}" in warning


def test_what_the_evaluator_cuts_is_recorded_with_the_scores(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(ColourEncoder, "warnings", lambda self, texts: [f"{texts[0]} is cut"])
    picture = Picture(draw(RED), "a long prompt")
    evaluation = PictureEvaluator(ColourEncoder(), ColourEncoder()).evaluate(
        [picture], instances_of(draw(RED), torch.ones(1, 32, 32), ("car",))
    )
    assert caplog.messages == ["a long prompt is cut"]
    evaluation.save(tmp_path / "scores.json")
    assert Evaluation.read(tmp_path / "scores.json").warnings == ("a long prompt is cut",)
    before = json.loads((tmp_path / "scores.json").read_text())
    del before["warnings"], before["checksum"]  # as in older files
    (tmp_path / "scores.json").write_text(json.dumps(before))
    assert Evaluation.read(tmp_path / "scores.json").warnings == ()


def test_scores_that_do_not_fit_the_pictures_are_refused(tmp_path):
    score = Score("leakage", 0.5, False, Evaluator("colour", "0" * 12), "test")
    path = tmp_path / "scores.json"
    picture = Picture(draw(RED), "a car")
    Evaluation((score,), ({"leakage": 0.5},) * 2).save(path)
    with pytest.raises(MifoError, match="scores 2 pictures, but there are 1"):
        scored(MetricsSettings(), [picture], None, tmp_path, torch.device("cpu"))
    for other in (
        Evaluation((score,), ({"beauty": 0.5},)),
        Evaluation((score,), (), ((0.5, 0.5), (0.5,))),
    ):
        path.unlink()
        other.save(path)
        with pytest.raises(MifoError, match=r"scores\.json is damaged"):
            Evaluation.read(path)


@pytest.mark.parametrize(("weights", "quick"), [("openai", True), ("laion2b_s32b_b82k", False)])
def test_weights_of_openai_get_the_gelu_that_they_were_learned_with(monkeypatch, weights, quick):
    asked = {}

    def create(name, **options):
        asked.update(options)
        raise RuntimeError("no network")

    monkeypatch.setattr(open_clip, "create_model", create)
    with pytest.raises(MifoError, match="no network"):
        load_image_text_encoder(ImageTextSettings("ViT-L-14", weights))
    assert asked["force_quick_gelu"] is quick


def test_vit_folder_is_loaded_with_the_same_hash_each_time(tmp_path):
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path)
    first, second = (
        load_image_encoder(ImageSettings(str(tmp_path))),
        load_image_encoder(ImageSettings(str(tmp_path))),
    )
    assert first.evaluator == second.evaluator and first.evaluator.name == f"{tmp_path.name}-16"
    images = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        expected = first.model(pixel_values=(images - 0.5) / 0.25).last_hidden_state[:, 0]
    torch.testing.assert_close(first.encode_images(images), expected)
    larger = load_image_encoder(ImageSettings(str(tmp_path), image_size=32))
    assert larger.encode_images(images).shape == (2, 8) and larger.evaluator != first.evaluator


class Distance(nn.Module):
    """Stands in for DreamSim's model: `embed` takes (B, 3, 224, 224) in [0, 1], a call compares two."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 5)

    def embed(self, img):
        assert img.shape[1:] == (3, 224, 224) and img.min() >= 0 and img.max() <= 1
        return self.layer(F.adaptive_avg_pool2d(img, 8).flatten(1))

    def forward(self, img_a, img_b):
        return 1 - F.cosine_similarity(self.embed(img_a), self.embed(img_b), dim=-1)


def dreamsim(
    pretrained=True,
    device="cuda",
    cache_dir="./models",
    normalize_embeds=True,
    dreamsim_type="ensemble",
    use_patch_model=False,
):
    """Stands in for the package's own function, whose weights are fetched from the network."""
    if dreamsim_type not in ("ensemble", "dino_vitb16"):
        raise KeyError(dreamsim_type)
    torch.hub.set_dir(cache_dir)
    torch.manual_seed(0)
    return Distance().to(device), None


def test_the_stand_in_for_dreamsim_is_called_as_the_package_is():
    package = pytest.importorskip("dreamsim")
    real, stand_in = (inspect.signature(each).parameters.values() for each in (package.dreamsim, dreamsim))
    assert [(each.name, each.default) for each in real] == [(each.name, each.default) for each in stand_in]


def test_dreamsims_similarity_is_one_minus_its_distance(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "dreamsim", SimpleNamespace(dreamsim=dreamsim, __spec__=True))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    encoder = load_image_encoder(ImageSettings("dreamsim"), batch_size=2)
    assert torch.hub.get_dir() == str(tmp_path) and (tmp_path / "dreamsim").is_dir()
    assert encoder.evaluator.name == "dreamsim-ensemble"
    crops = torch.rand(3, 3, 224, 224)
    references = torch.rand(3, 3, 224, 224)
    metric = InstanceConsistency()
    metric.update(encoder.encode_images(crops), encoder.encode_images(references), torch.arange(3))
    expected = 1 - encoder.model(crops, references)
    assert metric.compute() == pytest.approx(expected.mean().item(), abs=1e-4)
    single = load_image_encoder(ImageSettings("dreamsim:dino_vitb16"))
    assert single.evaluator.name == "dreamsim-dino_vitb16"
    with pytest.raises(MifoError, match="cannot be loaded"):
        load_image_encoder(ImageSettings("dreamsim:nothing"))
    with pytest.raises(MifoError, match="image_size null"):
        load_image_encoder(ImageSettings("dreamsim", image_size=448))


@pytest.mark.parametrize("option", sorted(path.stem for path in (conf_folder() / "metrics").glob("*.yaml")))
def test_every_choice_of_metrics_composes(option):
    settings = settings_of(compose("run", [f"metrics={option}", "paths.output=here"])).metrics
    if option == "none":
        assert settings is None
    else:
        assert settings.protocol == ("miniature" if option.startswith("miniature") else "standard")
        assert ("dreamsim" in settings.image.source) == (option == "dreamsim")


def test_without_the_package_dreamsim_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    with pytest.raises(MifoError, match="standard_metrics"):
        load_image_encoder(ImageSettings("dreamsim"))


@pytest.mark.parametrize("name", ["local-dir:/nowhere", "NoSuchModel"])
def test_missing_evaluators_are_named_in_one_sentence(name):
    with pytest.raises(MifoError, match="cannot be loaded"):
        load_image_text_encoder(ImageTextSettings(name))
    with pytest.raises(MifoError, match="cannot be loaded"):
        load_image_encoder(ImageSettings("./nowhere"))


def test_printed_scores_are_whole_on_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    evaluator = Evaluator("miniature-clip-stretched", "0123456789ab")
    print_scores((Score("instance_consistency_clip", 0.25, True, evaluator, "miniature", 3),))
    told = capsys.readouterr().out
    assert "instance_consistency_clip ↑" in told and "miniature-clip-stretched" in told and "…" not in told


def test_a_folder_is_the_same_however_it_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "instances.yaml").write_text(f"name: local\nfolder: {tmp_path}/photo\n")

    def warned(folder):
        given = ["pictures=.", "instances=local", f"instances.folder={folder}", "paths.output=unused"]
        check(settings := settings_of(compose("evaluate", given)))
        return other_instances(tmp_path, settings.instances)

    assert warned("photo") is None
    told = warned("other")
    assert f"learned from {tmp_path}/photo, but are scored against {tmp_path}/other;" in told
