"""Results that leave the house: diffusers' own calls read the files, and predict what MIFO predicts."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline, two_instances
from transformers import CLIPTextModel

from mifo.backbones.learned import Learned, load_learned, save_learned
from mifo.backbones.loading import load_model, load_outline
from mifo.backbones.settings import ModelSettings
from mifo.data.saved_pictures import as_image
from mifo.errors import MifoError
from mifo.exporting.card import card
from mifo.exporting.settings import ExportSettings, check_export, exported_words
from mifo.metrics.scores import Evaluator, Score
from mifo.tensors import write_tensors

PROMPT = "a photo of <asset1> and <asset0>"
SLOW = pytest.mark.slow
BOTH = ["sd", pytest.param("sdxl", marks=SLOW)]
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def family(request, tmp_path_factory):
    """The family's name and a folder of one of its pipelines."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sd":
        return request.param, str(tiny_pipeline(folder / "base"))
    return request.param, str(tiny_sdxl_pipeline(folder / "base", (1, 1)))


OF_LORA = re.compile(r"(unet\..*blocks?\..*|.*(q_proj|k_proj|v_proj|out_proj|fc1|fc2))\.weight")


def save(folder, source, trainable, matrices=True):
    """A result whose rows and weights, or its matrices alone, differ from the base model's at random."""
    model = load_model(ModelSettings("tiny", source))
    model.add_words(["<asset0>", "<asset1>"], ["car", None])
    if trainable == "lora":
        model.add_lora(2)
    generator = torch.Generator().manual_seed(0)
    learning = [*model.new_rows.values()]
    learning += [
        each
        for network, part in model.trainable(trainable).items()
        for name, each in part.items()
        if not matrices or "lora_" in name or (each.ndim > 1 and OF_LORA.fullmatch(f"{network}.{name}"))
    ]
    with torch.no_grad():
        for each in learning:
            each.add_(0.1 * torch.randn(each.shape, generator=generator))
    save_learned(
        folder / "learned",
        model,
        class_names=["car", "cat"],
        initializers=["car", None],
        stages={"semantic": 4, "finetuning": 2},
        trainable=trainable,
        lora_rank=2,
        config=f"instances: {{name: two, folder: '{folder / 'photo'}'}}\n",
    )
    instances, photo = two_instances(), folder / "photo"
    photo.mkdir()
    as_image(instances.image).save(photo / "img.png")
    for i, mask in enumerate(instances.masks):
        Image.fromarray((mask * 255).byte().numpy()).save(photo / f"mask{i}.png")


def predicted(pipeline, words=("<asset0>", "<asset1>")):
    """What a pipeline of diffusers predicts, and its states of the prompt."""
    prompt = PROMPT.replace("<asset0>", words[0]).replace("<asset1>", words[1])
    latents, added = torch.randn(1, 4, *[pipeline.unet.config.sample_size] * 2, generator=seeded()), {}
    if isinstance(pipeline, StableDiffusionXLPipeline):
        states, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]])}
    else:
        states, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
    return pipeline.unet(latents, 500, states, added_cond_kwargs=added).sample


def seeded():
    return torch.Generator().manual_seed(1)


def of_mifo(folder, source):
    model = load_model(ModelSettings("tiny", source))
    load_learned(folder / "learned", model)
    latents = torch.randn(1, *model.latent_shape, generator=seeded())
    return model.predict(latents, torch.tensor(500), model.encode_prompts([PROMPT]))[0]


def loaded(kind, source, folder, form):
    """The base pipeline with the exported words and LoRA, by diffusers' own calls."""
    pipe = PIPELINES[kind].from_pretrained(source)
    for i in (0, 1):
        if form == "webui":
            rows = load_file(folder / f"asset{i}.safetensors")
            encoders = [pipe.text_encoder] if kind == "sd" else [pipe.text_encoder, pipe.text_encoder_2]
            tokenizers = [pipe.tokenizer] if kind == "sd" else [pipe.tokenizer, pipe.tokenizer_2]
            named = [rows[name] for name in ("emb_params", "clip_l", "clip_g") if name in rows]
            for row, encoder, tokenizer in zip(named, encoders, tokenizers, strict=True):
                pipe.load_textual_inversion(row, f"<asset{i}>", text_encoder=encoder, tokenizer=tokenizer)
        else:
            second = {} if kind == "sd" else {"text_encoder": pipe.text_encoder_2}
            second |= {} if kind == "sd" else {"tokenizer": pipe.tokenizer_2}
            pipe.load_textual_inversion(folder / f"asset{i}.safetensors")
            if second:
                pipe.load_textual_inversion(folder / f"asset{i}.text_encoder_2.safetensors", **second)
    if kind == "sdxl":
        pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    (weights,) = [*folder.glob("pytorch_lora_weights.safetensors"), *folder.glob("mifo.safetensors")]
    pipe.load_lora_weights(folder, weight_name=weights.name)
    return pipe


def export(mifo, source, *given, folder="E"):
    model = ["model=local", f"model.source={source}"]
    return mifo("export", "learned=.", *model, *given, f"hydra.run.dir={folder}")


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "trainable", "form"),
    [
        ("sd", "lora", "diffusers"),
        pytest.param("sd", "full", "webui", marks=SLOW),
        pytest.param("sd", "cross_attention_kv", "diffusers", marks=SLOW),
        pytest.param("sdxl", "lora", "diffusers", marks=SLOW),
        pytest.param("sdxl", "full", "webui", marks=SLOW),
        pytest.param("sdxl", "denoiser", "diffusers", marks=SLOW),
    ],
    indirect=["family"],
)
def test_exported_words_and_lora_predict_in_diffusers_what_mifo_predicts(
    mifo, family, tmp_path, capsys, trainable, form
):
    kind, source = family
    save(tmp_path, source, trainable)
    assert export(mifo, source, f"format={form}", "rank=128") == 0
    exported, expected = tmp_path / "E" / "exported", of_mifo(tmp_path, source)
    assert "lacks 0.00%" in capsys.readouterr().out
    pipe = loaded(kind, source, exported, form)
    torch.testing.assert_close(predicted(pipe), expected, atol=1e-4, rtol=1e-3)
    pipe.unload_lora_weights()
    assert (predicted(pipe) - expected).abs().max() > 1e-2
    # and back: what was exported as a base model
    second = "" if form == "webui" or kind == "sd" else f",{exported}/asset{{}}.text_encoder_2.safetensors"
    words = {f"<asset{i}>": f"{exported}/asset{i}.safetensors{second.format(i)}".split(",") for i in (0, 1)}
    (lora,) = [*exported.glob("pytorch_lora_weights.safetensors"), *exported.glob("mifo.safetensors")]
    model = load_model(ModelSettings("back", source, words=words, lora=str(lora)))
    latents = torch.randn(1, *model.latent_shape, generator=seeded())
    found = model.predict(latents, torch.tensor(500), model.encode_prompts([PROMPT]))[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert model.fingerprint != load_model(ModelSettings("tiny", source)).fingerprint


@torch.no_grad()
@pytest.mark.parametrize("family", BOTH, indirect=True)
def test_webui_reads_names_and_scales_as_kohyas_scripts_write_them(mifo, family, tmp_path):
    """lora_unet_…, lora_te_… (of two encoders lora_te1_…, lora_te2_…) with lora_down, lora_up and alpha."""
    kind, source = family
    save(tmp_path, source, "full")
    assert export(mifo, source, "format=webui", "rank=128") == 0
    file = load_file(tmp_path / "E" / "exported" / "mifo.safetensors")
    learned, base = load_model(ModelSettings("tiny", source)), load_model(ModelSettings("tiny", source))
    load_learned(tmp_path / "learned", learned)
    encoders = ["lora_te"] if kind == "sd" else ["lora_te1", "lora_te2"]
    changed = set()
    for prefix, name in zip(["lora_unet", *encoders], base.networks, strict=True):
        after = dict(learned.networks[name].named_modules())
        for path, layer in base.networks[name].named_modules():
            of_kohya = path if prefix == "lora_unet" else f"text_model.{path.removeprefix('text_model.')}"
            key = f"{prefix}_{of_kohya.replace('.', '_')}"
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and f"{key}.alpha" in file:
                down, up = file[f"{key}.lora_down.weight"], file[f"{key}.lora_up.weight"]
                added = up.flatten(1) @ down.flatten(1) * file[f"{key}.alpha"] / len(down)
                expected = after[path].weight - layer.weight
                torch.testing.assert_close(added.view_as(expected), expected, atol=1e-5, rtol=1e-4)
                changed |= {f"{key}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert changed == {*file} and {key.partition("_")[0] for key in file} == {"lora"}
    assert all(any(key.startswith(f"{prefix}_") for key in file) for prefix in ["lora_unet", *encoders])
    word = load_file(tmp_path / "E" / "exported" / "asset0.safetensors")
    names = ["emb_params"] if kind == "sd" else ["clip_l", "clip_g"]
    assert {*word} == {*names}
    for name, rows in zip(names, learned.new_rows.values(), strict=True):
        assert torch.equal(word[name], rows[:1])


@torch.no_grad()
@pytest.mark.parametrize("family", BOTH, indirect=True)
def test_a_lora_tells_what_it_lacks_and_a_pipeline_lacks_nothing(mifo, family, tmp_path, capsys):
    kind, source = family
    save(tmp_path, source, "full", matrices=False)
    assert export(mifo, source, "rank=2") == 0
    told = float(re.search(r"lacks ([\d.]+)%", capsys.readouterr().out)[1])
    card = (tmp_path / "E" / "exported" / "README.md").read_text()
    assert 10 < told < 100 and f"lacks {told:.2f}%" in card and "| `<asset0>` | car |" in card
    assert Image.open(tmp_path / "E" / "exported" / "thumbnail.jpg").width > 64
    assert export(mifo, source, "rank=2") == 2  # nothing is replaced
    assert export(mifo, source, "weights=pipeline", "words=['<mine>','<yours>']", folder="P") == 0
    pipe = PIPELINES[kind].from_pretrained(tmp_path / "P" / "exported" / "pipeline")
    found = predicted(pipe, ("<mine>", "<yours>"))
    torch.testing.assert_close(found, of_mifo(tmp_path, source), atol=1e-4, rtol=1e-3)


def test_what_a_stranger_wrote_is_text_in_the_card():
    odd = 'x"); import os | <script> [a](b) `c`'
    base = {"name": odd, "source": odd, "revision": odd, "fingerprint": odd}
    learned = Learned(["<asset0>"], [odd], None, {odd: 1}, "full", 0, base)
    scores = [Score("leakage", 0.5, False, Evaluator(odd, odd), odd)]
    told = card(ExportSettings(), learned, ["<asset0>"], {}, "Pipeline", [], None, scores, None)
    page, script, scored = re.split("```(?:python)?\n", told)
    for text in (page, scored):
        assert "import os" in text and not re.search(r"(?<!\\)(<script|\[a)", text)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in page.splitlines() if line[:1] == "|")
    calls = [node for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Call)]
    (made,) = [call for call in calls if getattr(call.func, "attr", "") == "from_pretrained"]
    assert [made.args[0].value, made.keywords[0].value.value] == [odd, odd]


@pytest.mark.slow
@pytest.mark.parametrize("family", BOTH, indirect=True)
def test_the_script_of_the_card_works_without_mifo(mifo, family, tmp_path):
    kind, source = family[0], str(shutil.copytree(family[1], tmp_path / "base"))
    encoder = f"{source}/text_encoder"  # in half precision, as that of Stable Diffusion XL is
    CLIPTextModel.from_pretrained(encoder).half().save_pretrained(encoder)
    save(tmp_path, source, "lora")
    assert export(mifo, source, "rank=8") == 0
    card = (tmp_path / "E" / "exported" / "README.md").read_text()
    script = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert '("tiny", torch_dtype=torch.float32)  # a folder: say where it lies' in script
    script = script.replace('"tiny"', repr(source))
    script += "\nimport sys\nassert not any(name.split('.')[0] == 'mifo' for name in sys.modules)\n"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "E" / "exported", check=True)
    assert Image.open(tmp_path / "E" / "exported" / "picture.png").width == {"sd": 32, "sdxl": 64}[kind]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"format": "kohya"}, "format=kohya is not known"),
        ({"precision": "float8"}, "precision=float8 is not known"),
        ({"rank": 0}, "rank=0 is too small"),
        ({"format": "webui", "weights": "pipeline"}, "weights=pipeline is a folder of diffusers"),
        ({"words": ["one"]}, "words=one must be 2 different words"),
        ({"words": ["cat", "Cat"]}, "capitals make no difference"),
        ({"words": ["cat", "<cat>"]}, "must be 2 different words"),
        ({"words": ["a/b", "c"]}, "'a/b' is no name of a word"),
    ],
)
def test_exports_that_cannot_be_are_refused_by_their_key(given, words):
    with pytest.raises(MifoError, match=words):
        check_export(ExportSettings(**given))
        exported_words(ExportSettings(**given), ["<asset0>", "<asset1>"])


def test_an_export_that_cannot_be_is_refused_before_a_model_is_loaded(mifo, source, tmp_path, monkeypatch):
    save(tmp_path, source, "tokens")
    monkeypatch.setattr("mifo.commands.export.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert export(mifo, source, "words=[one]") == 2


@pytest.mark.parametrize("weights", ["lora", "pipeline"])
def test_a_word_that_the_base_model_knows_is_no_name_in_diffusers(mifo, source, tmp_path, capsys, weights):
    save(tmp_path, source, "tokens")
    assert export(mifo, source, f"weights={weights}", "words=[mine,car]") == 2
    assert "words: the model knows 'car' already; take a new word, such as mycar" in capsys.readouterr().err
    assert export(mifo, source, f"weights={weights}", "words=[mine,mycar]") == 0


def test_words_and_loras_of_another_kind_are_refused_by_name(mifo, source, tmp_path):
    write_tensors(tmp_path / "wide.safetensors", {"x": torch.zeros(1, 24)})
    write_tensors(tmp_path / "many.safetensors", {"x": torch.zeros(3, 16)})
    write_tensors(tmp_path / "number.safetensors", {"x": torch.zeros(())})
    write_tensors(tmp_path / "folded.safetensors", {"x": torch.zeros(4, 4)})
    write_tensors(tmp_path / "lora.safetensors", {"unet.no.lora_A.weight": torch.zeros(2, 8)})
    write_tensors(tmp_path / "plain.safetensors", {"weight": torch.zeros(2, 8)})
    (tmp_path / "old.pt").write_bytes(b"PK")
    for given, told in (
        ({"words": {"<x>": f"{tmp_path}/wide.safetensors"}}, "read widths 16"),
        ({"words": {"<x>": f"{tmp_path}/number.safetensors"}}, "read widths 16"),
        ({"words": {"<x>": f"{tmp_path}/folded.safetensors"}}, "has 4 vectors"),
        ({"words": {"<x>": f"{tmp_path}/many.safetensors"}}, "3 vectors"),
        ({"words": {"car": f"{tmp_path}/many.safetensors"}}, "'car', which the model knows"),
        ({"words": {"<x>": f"{tmp_path}/old.pt"}}, r"old\.pt is damaged"),
        ({"lora": f"{tmp_path}/none.safetensors"}, r"model\.lora: .*none\.safetensors cannot be read"),
    ):
        with pytest.raises(MifoError, match=told):
            load_outline(ModelSettings("tiny", source, **given))
    wide = f"model.words.mycat={tmp_path}/wide.safetensors"  # refused before a run claims its folder
    assert mifo("learn", "model=local", f"model.source={source}", wide) == 2
    assert not [*tmp_path.glob("outputs/learn/*/config.yaml")]
    for name in ("lora", "plain"):
        with pytest.raises(MifoError, match=rf"{name}\.safetensors does not fit"):
            load_model(ModelSettings("tiny", source, lora=f"{tmp_path}/{name}.safetensors"))


@torch.no_grad()
@pytest.mark.slow
def test_stable_diffusion_3_is_exported_as_a_pipeline(mifo, tmp_path, capsys):
    source = str(tiny_sd3_pipeline(tmp_path / "base", t5=False))
    save(tmp_path, source, "full", matrices=False)
    assert export(mifo, source) == 2
    assert "StableDiffusion3Pipeline of diffusers loads no words" in capsys.readouterr().err
    assert export(mifo, source, "weights=pipeline", folder="P") == 0
    exported = tmp_path / "P" / "exported"
    assert ", text_encoder_3=None, tokenizer_3=None, torch_dtype=" in (exported / "README.md").read_text()
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(exported / "pipeline", **absent)
    given = {"max_sequence_length": 0, "do_classifier_free_guidance": False}
    states, _, pooled, _ = pipe.encode_prompt(PROMPT, None, None, **given)
    model = load_model(ModelSettings("tiny", source))
    load_learned(tmp_path / "learned", model)
    found = model.encode_prompts([PROMPT]).parts
    torch.testing.assert_close(pooled, found["pooled"], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(states, found["states"], atol=1e-4, rtol=1e-3)
