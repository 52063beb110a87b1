"""Numbers that are not finite and files that are damaged are refused; learning goes on from what is whole."""

import json
import math
import random
import shutil
from dataclasses import asdict, replace
from functools import reduce

import pytest
import torch
from lightning import Callback
from safetensors.torch import save_file
from tiny import MeanColour, instances_of, two_instances

from mifo.backbones.learned import Learned, load_learned, read_learned
from mifo.backbones.loading import load_model
from mifo.backbones.settings import ModelSettings
from mifo.config.checks import check
from mifo.config.schema import LearnSettings
from mifo.data.saved_pictures import Picture
from mifo.data.settings import PriorSettings
from mifo.errors import MifoError
from mifo.files import check_room, read_json
from mifo.method.backbone import Conditioning
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.losses.settings import PenaltySettings
from mifo.method.objective import learning_loss
from mifo.method.prompts.instances import PromptTokens
from mifo.method.synthesis.sampler import Sampler
from mifo.method.synthesis.settings import SynthesisSettings
from mifo.metrics.evaluation import Evaluation, PictureEvaluator
from mifo.metrics.scores import Evaluator, Score
from mifo.tensors import not_finite, read_tensors, write_tensors
from mifo.training.checkpoints import WholeCheckpoints, newest_checkpoint
from mifo.training.fit import learn
from mifo.training.settings import LearningSettings, StageSettings

TRAINER = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture
def settings(tmp_path_factory):
    return LearningSettings(
        semantic=StageSettings(steps=4, checkpoint_every=1, lr_warmup_steps=0),
        finetuning=StageSettings(steps=0),
        prior=PriorSettings(pictures=2, steps=2, cache=str(tmp_path_factory.getbasetemp() / "prior")),
    )


def learned(model, settings, folder, **options):
    options = {"trainer": TRAINER} | options
    return learn(model, two_instances(), settings, PenaltySettings(), folder, **options)


def test_every_number_of_the_settings_is_finite(mifo, capsys, monkeypatch):
    monkeypatch.setattr("mifo.commands.learn.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert mifo("learn", "learning.semantic.learning_rate=1e400") == 2
    assert "error: learning.semantic.learning_rate=inf is not finite" in capsys.readouterr().err
    for key, value in {
        "penalty.reward_weight": math.nan,
        "learning.semantic.gradient_clip": -math.inf,
        "learning.semantic.betas": (0.9, math.nan),
        "trainer": {"limit_train_batches": math.inf},
    }.items():
        settings = LearnSettings()
        *parents, last = key.split(".")
        setattr(reduce(getattr, parents, settings), last, value)
        with pytest.raises(MifoError, match=f"^{key}.*is not finite"):
            check(settings)


def test_learning_that_diverges_ends_with_stage_step_part_and_rate(model, settings, tmp_path):
    settings.semantic.learning_rate = 1e30
    with pytest.raises(
        MifoError, match=r"stage semantic at step \d: its .* (is nan|is inf|not finite).*learning_rate=1e\+30"
    ):
        learned(model, settings, tmp_path)
    assert not (tmp_path / "learned").exists()
    for file in tmp_path.glob("checkpoints/*/*.ckpt"):
        assert not not_finite(torch.load(file, weights_only=True)["state_dict"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 300, 7)])
def test_one_number_that_is_not_finite_is_found(dtype, shape):
    tree = {"a": torch.ones(2, 3).t(), "none": torch.zeros(0), "in": [torch.full(shape, -3.0).to(dtype)]}
    assert not_finite(tree) is None
    for bad in (torch.nan, torch.inf, -torch.inf):
        tree["in"][0].view(-1)[-1] = bad
        assert not_finite(tree) == "in.0"


@pytest.mark.parametrize("part", ["denoising", "prior", "attention", "gradient_norm", "weight"])
def test_on_a_gpu_numbers_are_read_later_and_told_as_they_came(model, settings, tmp_path, monkeypatch, part):
    """As on a GPU, where nothing is read before step 4; the first bad number is of step 2."""

    class Spoil(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            self.step = trainer.global_step + 1

        def on_before_optimizer_step(self, trainer, module, optimizer):
            if self.step != 2:
                return
            if part == "gradient_norm":
                module.model.new_rows["text_encoder"].grad.fill_(torch.inf)

        def on_train_batch_end(self, trainer, module, *args):
            if part == "weight" and self.step == 4:
                module.model.new_rows["text_encoder"].data[1] = torch.nan

    calls = []

    def spoiled(*inputs):
        calls.append(learning_loss(*inputs))
        spoils = len(calls) == 2 and part not in ("gradient_norm", "weight")
        return replace(calls[-1], **{part: torch.tensor(torch.nan)}) if spoils else calls[-1]

    settings.semantic.checkpoint_every = 0
    monkeypatch.setattr("mifo.training.stages.learning_loss", spoiled)
    monkeypatch.setattr("mifo.training.finite._interval", lambda *_: 4)
    told = {"gradient_norm": "at step 2: its gradient norm is inf", "weight": "at step 4: its weight"}
    with pytest.raises(MifoError, match=told.get(part, f"at step 2: its {part} loss is nan")):
        learned(model, settings, tmp_path, callbacks=[Spoil()])
    assert not (tmp_path / "learned").exists()


class Kill(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@pytest.fixture
def killed(source, settings, tmp_path):
    """A folder of a run that was killed after step 3 of 4, which holds the checkpoints of steps 1 and 2."""
    with pytest.raises(RuntimeError, match="killed"):
        learned(load_model(ModelSettings("tiny", source)), settings, tmp_path / "run", callbacks=[Kill(3)])
    return tmp_path / "run"


def spoil(file):
    content = bytearray(file.read_bytes())
    start = len(content) // 2
    content[start : start + 64] = bytes(255 - each for each in content[start : start + 64])
    file.write_bytes(content)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(source, killed, settings, tmp_path, caplog):
    stage = killed / "checkpoints" / "semantic"
    assert sorted(file.name for file in stage.iterdir()) == ["last.ckpt", "previous.ckpt"]
    steps = [torch.load(stage / f"{name}.ckpt")["global_step"] for name in ("previous", "last")]
    assert steps == [1, 2]
    (stage / ".last.ckpt.unfinished").write_text("of a killed run")
    (killed / ".learned_x1y2z3w").mkdir()
    whole = load_model(ModelSettings("tiny", source))
    learned(whole, settings, tmp_path / "whole")
    for number, harm in enumerate((spoil, lambda file: file.unlink(), lambda file: None)):
        folder = tmp_path / str(number)
        shutil.copytree(killed, folder)
        harm(folder / "checkpoints" / "semantic" / "last.ckpt")
        caplog.clear()
        again = load_model(ModelSettings("tiny", source))
        learned(again, settings, folder)
        assert torch.equal(again.new_rows["text_encoder"], whole.new_rows["text_encoder"])
        assert ("last.ckpt is damaged: its checksum is another" in caplog.text) == (harm is spoil)
        assert [file.name for file in folder.iterdir()] == ["learned"]


def test_checkpoints_that_cannot_be_trusted_are_refused(source, killed, settings):
    stage = killed / "checkpoints" / "semantic"
    (stage / "previous.ckpt").unlink()
    good = torch.load(stage / "last.ckpt", weights_only=True)
    (name,) = good["state_dict"]
    rows = good["state_dict"][name]
    for state, words in (
        ({}, "it lacks"),
        ({name: rows[0]}, "has the shape"),
        ({name: rows.double()}, "has the precision"),
        ({name: rows, "other": rows}, "holds the unknown other"),
        ({name: rows * torch.nan}, "is not finite; delete the folder .*semantic, and its stage begins anew"),
    ):
        WholeCheckpoints().save_checkpoint(good | {"state_dict": state}, stage / "last.ckpt")
        (stage / "previous.ckpt").unlink()
        with pytest.raises(MifoError, match=words):
            learned(load_model(ModelSettings("tiny", source)), settings, killed)
    torch.save(good, stage / "last.ckpt")  # without its checksum
    with pytest.raises(MifoError, match="checksum is another; delete the folder"):
        learned(load_model(ModelSettings("tiny", source)), settings, killed)
    assert newest_checkpoint(stage) and not newest_checkpoint(killed)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (torch.tensor(1.0), "has the shape"),
        (torch.ones(2), "has the shape"),
        (torch.ones(1, 16), "has the shape"),
        (torch.ones(3, 1), "has the shape"),
        (torch.ones(2, 16, dtype=torch.int64), "type I64"),
        (torch.ones(2, 16, dtype=torch.bool), "type BOOL"),
        (torch.full((2, 16), torch.inf), "rows is not finite"),
        (torch.full((2, 16), torch.nan), "rows is not finite"),
        (None, "lacks rows"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, rows, words):
    file = tmp_path / "tokens.safetensors"
    save_file({"other": torch.ones(1)} if rows is None else {"rows": rows}, file)
    with pytest.raises(MifoError, match=f"tokens.safetensors is damaged: .*{words}"):
        read_tensors(file, {"rows": (2, 16)})


def test_tensors_come_back_with_their_checksum(tmp_path):
    file, rows = tmp_path / "a.safetensors", torch.randn(2, 3)
    checksum = write_tensors(file, {"rows": rows})
    assert torch.equal(read_tensors(file, {"rows": (2, 3)}, checksum)["rows"], rows)
    with pytest.raises(MifoError, match="holds the unknown rows"):
        read_tensors(file, {})
    with pytest.raises(MifoError, match="rows is not finite"):
        write_tensors(tmp_path / "b.safetensors", {"rows": rows / 0})
    save_file({"rows": rows + 1}, file)
    with pytest.raises(MifoError, match="checksum"):
        read_tensors(file, {"rows": (2, 3)}, checksum)
    file.write_bytes(b"\xff" * 64)
    for path in (file, tmp_path, tmp_path / "none"):
        with pytest.raises(MifoError, match=path.name):
            read_tensors(path, {"rows": (2, 3)})


def test_a_damaged_learned_json_is_refused_and_an_old_one_is_read(source, model, settings, tmp_path):
    learned(model, settings, tmp_path)
    folder, base = tmp_path / "learned", load_model(ModelSettings("tiny", source))
    file = folder / "learned.json"
    content = json.loads(file.read_text())
    assert set(content["checksums"]) == {"tokens.safetensors", "config.yaml"}
    for change in (
        {"tokens": []},
        {"tokens": ["<asset0>", "<asset0>"]},
        {"tokens": "<asset0>"},
        {"learn": "everything"},
        {"learn": "lora", "lora_rank": 10**9},
        {"base": {}},
        {"class_names": ["car"]},
        {"stages": {"semantic": 1.5}},
        {"other": 1},
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(MifoError, match=r"learned\.json is damaged"):
            read_learned(folder)
    file.write_text(json.dumps(content))
    config = folder / "config.yaml"
    whole = config.read_text()
    config.write_text(whole + "seed: 7\n")
    with pytest.raises(MifoError, match=r"learned/config\.yaml is damaged: its checksum"):
        read_learned(folder)
    config.write_text(whole)
    del content["checksums"]
    file.write_text(json.dumps(content))
    load_learned(folder, base)
    assert torch.equal(base.new_rows["text_encoder"], model.new_rows["text_encoder"])


def test_a_full_disk_is_told_before_learning_and_saving_loses_nothing(
    source, model, settings, tmp_path, monkeypatch
):
    with pytest.raises(MifoError, match=r"needs 1024\.00 GiB, but its disk has .* GiB free"):
        check_room(tmp_path, 2**40)
    (tmp_path / "file").touch()
    with pytest.raises(MifoError, match="cannot be written to"):
        check_room(tmp_path / "file" / "run", 1)
    full = [tmp_path / "run" / ".learned.unfinished"]

    def save(tensors, path):
        if path.parent in full:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("mifo.tensors.save_file", save)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(MifoError, match=r"No space left on device.*move what was learned there from") as told:
        learned(model, settings, tmp_path / "run")
    (kept,) = tmp_path.glob("mifo-*/learned")
    assert str(kept) in str(told.value)
    again = load_model(ModelSettings("tiny", source))
    load_learned(kept, again)
    assert torch.equal(again.new_rows["text_encoder"], model.new_rows["text_encoder"])
    assert (tmp_path / "run" / "checkpoints" / "semantic" / "last.ckpt").is_file()
    full.clear()
    resumed = load_model(ModelSettings("tiny", source))
    learned(resumed, settings, tmp_path / "run")
    assert torch.equal(resumed.new_rows["text_encoder"], model.new_rows["text_encoder"])


@pytest.mark.parametrize("boxes", [False, True])
def test_latents_and_pictures_that_are_not_finite_are_refused(model, boxes):
    passes, latents = [], torch.randn(1, 4, 16, 16)

    def spoil(module, inputs, output):
        passes.append(output)
        return output * torch.nan if len(passes) == 3 else output

    model.unet.requires_grad_(False).conv_out.register_forward_hook(spoil)
    guidance = GuidanceSettings(guided_steps=0, shapes_from=1, shapes_every=1)
    sampler = Sampler(model, SynthesisSettings(steps=5), guidance)
    conditioning, tokens = (
        Conditioning({"states": torch.randn(2, 32, 16)}),
        PromptTokens({"cat": (2,)}, (), 5, 32),
    )
    with pytest.raises(MifoError, match="latents are not finite after step 3 of 5"):
        sampler(conditioning, latents, {"cat": (0.0, 0.0, 0.5, 0.5)} if boxes else {}, tokens)
    with pytest.raises(MifoError, match="the autoencoder of tiny gives pixels that are not finite"):
        model.decode_latents(latents * torch.inf)


def test_scores_that_are_not_finite_are_refused(tmp_path):
    class Spoiled(MeanColour):
        def encode_images(self, images):
            features = super().encode_images(images)
            return torch.where(features > 0.9, torch.nan, features)

    images = torch.full((2, 3, 32, 32), 0.5)
    images[1] = 1
    instances = instances_of(torch.rand(3, 32, 32) / 2, torch.ones(1, 32, 32), ("car",))
    boxes = {"<asset0>": (0.0, 0.0, 0.5, 0.5)}
    pictures = [Picture(image, "a photo of <asset0>", boxes) for image in images]
    for encoders, metric in (
        ((Spoiled(), MeanColour()), "editability"),
        ((MeanColour(), Spoiled()), "instance"),
    ):
        with pytest.raises(MifoError, match=f"{metric}.* of picture 1.*: nan is not in"):
            PictureEvaluator(*encoders).evaluate(pictures, instances)
    score = Score("leakage", float("nan"), False, Evaluator("colour", "0" * 12), "test")
    path = tmp_path / "scores.json"
    with pytest.raises(MifoError, match="a score is not finite"):
        Evaluation((score,), ()).save(path)
    for value in ("NaN", "1e999", '"1"', "true", "1.5", "0.51"):
        Evaluation((Score("leakage", 0.5, False, Evaluator("colour", "0" * 12), "test"),), ()).save(path)
        path.write_text(path.read_text().replace("0.5", value))
        with pytest.raises(MifoError, match=r"scores\.json is damaged"):
            Evaluation.read(path)
        path.unlink()
    path.write_text("1e999")
    with pytest.raises(MifoError, match="no finite number"):
        read_json(path)


def damaged(content, draw):
    """Bytes cut short, changed in a few places, or of another kind."""
    kind = draw.choice(("cut", "changed", "other"))
    if kind == "other":
        return draw.randbytes(draw.randrange(300))
    if kind == "cut":
        return content[: draw.randrange(len(content))]
    content, head = bytearray(content), draw.choice((200, len(content)))
    for _ in range(draw.choice((1, 3, 64))):
        content[draw.randrange(min(len(content), head))] = draw.randrange(256)
    return bytes(content)


def changed(record, draw):
    """JSON in which one value is another one, or missing."""
    places, record = [], json.loads(record)
    waiting = [record]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        places += [(node, key) for key in keys]
        waiting += [node[key] for key in keys]
    node, key = draw.choice(places)
    node[key] = draw.choice([None, True, -1, 1e308, 10**30, "x", "", [], {}, [None], {"a": 1}, [[[]]]])
    if draw.random() < 0.3:
        del node[key]
    return json.dumps(record).encode()


def test_damaged_files_end_in_a_sentence(killed, tmp_path):
    shape, draw = (2, 16), random.Random(0)
    write_tensors(tmp_path / "tokens.safetensors", {"rows": torch.ones(shape)})
    score = Score("leakage", 0.5, False, Evaluator("colour", "0" * 12), "test")
    Evaluation((score,), ({"leakage": 0.5},), ((0.5, None), (None, 0.5))).save(tmp_path / "scores.json")
    base = {"name": "tiny", "source": "tiny", "revision": None, "fingerprint": "0"}
    record = Learned(["<asset0>"], ["car"], None, {"semantic": 4}, "tokens", 16, base, "epsilon")
    (tmp_path / "learned.json").write_text(json.dumps(asdict(record)))
    shutil.copy(killed / "checkpoints" / "semantic" / "last.ckpt", tmp_path)
    for name, read in (
        ("tokens.safetensors", lambda file: read_tensors(file, {"rows": shape})),
        ("scores.json", Evaluation.read),
        ("learned.json", lambda file: read_learned(file.parent)),
        ("last.ckpt", lambda file: WholeCheckpoints().load_checkpoint(file)),
    ):
        refused, good = 0, (tmp_path / name).read_bytes()
        for number in range(300):
            harm = changed if name.endswith("json") and number % 2 else damaged
            (tmp_path / name).write_bytes(harm(good, draw))
            try:
                read(tmp_path / name)
            except MifoError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error)
                refused += 1
        assert refused > 200
