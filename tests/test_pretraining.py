"""Every part of the pretraining steps, continues from its checkpoint and is exported as it will be used."""

import json
import math
from dataclasses import replace

import open_clip
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer, ViTImageProcessor, ViTModel

from mifo.backbones.loading import load_model
from mifo.backbones.settings import ModelSettings
from mifo.errors import MifoError
from mifo.files import WEIGHTS
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.synthesis.sampler import Sampler
from mifo.method.synthesis.settings import SynthesisSettings
from mifo.miniature.pretraining.augmentation import repaint, soften, warp
from mifo.miniature.pretraining.corpus import (
    Corpus,
    crop,
    crowd,
    draw_corpus,
    jitter,
    portraits,
    tokenise_captions,
    with_siblings,
)
from mifo.miniature.pretraining.denoiser import DenoiserPretraining, build_scheduler
from mifo.miniature.pretraining.run import PARTS, pretrain
from mifo.miniature.pretraining.segmenter import BACKGROUND, class_maps, draw_class_maps, load_segmenter
from mifo.miniature.pretraining.settings import PartSettings, PretrainSettings
from mifo.miniature.pretraining.text_encoder import WIDTH, TextEncoderPretraining, build_text_encoder
from mifo.miniature.pretraining.training import fit
from mifo.miniature.pretraining.vit import likeness
from mifo.miniature.pretraining.words import (
    ATTRIBUTES,
    OFFSET,
    WordWriter,
    attributes,
    rows_of_words,
)
from mifo.miniature.tokenizer import build_tokenizer
from mifo.world.scenes import captions, sample_scenes
from mifo.world.vocabulary import THINGS

CPU = torch.device("cpu")


def tiny(parts, steps):
    few = {part: PartSettings(steps, 4, 1e-3) for part in PARTS}
    return PretrainSettings(parts=list(parts), scenes=12, compile=False, **few)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All parts after one step, then taken to the second from their checkpoints."""
    work = tmp_path_factory.mktemp("work")
    folder = tmp_path_factory.mktemp("weights")
    assert pretrain(tiny(PARTS, 1), work, folder, CPU, logger=False) == dict.fromkeys(PARTS, True)
    first = {part: torch.load(work / f"{part}.pt", weights_only=True) for part in PARTS}
    assert pretrain(tiny(PARTS, 2), work, folder, CPU, logger=False) == dict.fromkeys(PARTS, True)
    return work, folder, first


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_goes_on_from_its_checkpoint(part, made):
    work, _, first = made
    checkpoint = torch.load(work / part / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 2
    now = torch.load(work / f"{part}.pt", weights_only=True)
    assert now.keys() == first[part].keys()
    assert any(not torch.equal(now[name], first[part][name]) for name in now)
    assert all(value.isfinite().all() for value in now.values() if value.is_floating_point())


def test_stopping_and_going_on_changes_nothing(tmp_path):
    """While the rate still warms up, it does not depend on the number of steps."""
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    corpus = draw_corpus(8, 0, torch.device("cpu"), tokenizer)

    def learned(folder, *stops):
        for steps in stops:
            torch.manual_seed(0)
            module = TextEncoderPretraining(corpus, tokenizer, tiny(["text_encoder"], steps))
            fit(module, tmp_path / folder, CPU, logger=False)
        return module

    whole, parted = learned("whole", 3), learned("parted", 1, 3)
    for one, other in zip(whole.average.parameters(), parted.average.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_each_call_has_its_own_minutes(tmp_path):
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    corpus = draw_corpus(8, 0, torch.device("cpu"), tokenizer)
    steps = []
    for _ in range(2):
        module = TextEncoderPretraining(corpus, tokenizer, tiny(["text_encoder"], 100))
        assert not fit(module, tmp_path / "part", CPU, minutes=1e-6, logger=False)
        steps.append(module.global_step)
    assert 0 < steps[0] < steps[1] < 100


@pytest.mark.slow
def test_the_generator_is_an_ordinary_pipeline(made):
    pipeline = StableDiffusionPipeline.from_pretrained(made[1] / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = pipeline("a photo of a red car", num_inference_steps=2, output_type="pt").images
    assert picture.shape == (3, 128, 128)


@pytest.mark.slow
def test_the_clip_is_an_open_clip_folder(made):
    folder = made[1] / "clip"
    model = open_clip.create_model(f"local-dir:{folder}")
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(["a photo of a red car at the beach"])
    assert torch.equal(
        ids[0, :9],
        torch.tensor(
            AutoTokenizer.from_pretrained(folder)("a photo of a red car at the beach").input_ids[:9]
        ),
    )
    assert model.encode_text(ids).shape == model.encode_image(torch.zeros(1, 3, 128, 128)).shape == (1, 128)
    assert json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]["mean"] == [0.5] * 3


@pytest.mark.slow
def test_the_vit_is_a_transformers_folder(made):
    model = ViTModel.from_pretrained(made[1] / "vit", add_pooling_layer=False, dtype=torch.float32)
    processor = ViTImageProcessor.from_pretrained(made[1] / "vit")
    pixels = processor(torch.zeros(3, 100, 90), return_tensors="pt", do_rescale=False).pixel_values
    assert model(pixels).last_hidden_state.shape == (1, 65, 192)


@pytest.mark.slow
def test_the_segmenter_maps_every_pixel_to_a_class(made):
    maps = class_maps(load_segmenter(made[1] / "segmenter"), torch.rand(2, 3, 128, 128))
    assert maps.shape == (2, 64, 64) and maps.min() >= 0 and maps.max() <= BACKGROUND
    with pytest.raises(MifoError, match=r"parts=\[segmenter\]"):
        load_segmenter(made[0])


def test_class_maps_agree_with_the_drawings():
    pictures, maps = draw_class_maps(24, torch.Generator().manual_seed(3))
    assert pictures.shape == (24, 3, 64, 64) and maps.shape == (24, 64, 64)
    share = (maps != BACKGROUND).float().mean((1, 2))
    assert (share > 0.02).all() and (share < 0.7).all()


def test_parts_are_refused_by_name(tmp_path):
    with pytest.raises(MifoError, match=r"pretraining\.parts=unet is not known"):
        pretrain(tiny(["unet"], 1), tmp_path, tmp_path, CPU)
    with pytest.raises(MifoError, match="'autoencoder' must be made first"):
        pretrain(tiny(["denoiser"], 1), tmp_path / "work", tmp_path / "weights", CPU, logger=False)


def test_what_would_train_nothing_is_refused(tmp_path):
    with pytest.raises(MifoError, match=r"pretraining.parts=\[\] trains nothing"):
        pretrain(tiny([], 1), tmp_path, tmp_path, CPU)
    with pytest.raises(MifoError, match=r"pretraining.segmenter.steps=0 is too small; take at least 1"):
        pretrain(tiny(["segmenter"], 0), tmp_path, tmp_path, CPU)
    with pytest.raises(MifoError, match=r"pretraining.scenes=0 is too small"):
        pretrain(replace(tiny(["segmenter"], 1), scenes=0), tmp_path, tmp_path, CPU)
    assert not any(tmp_path.iterdir())


def test_boxes_are_cut_out_and_stretched():
    picture = torch.zeros(1, 3, 32, 32)
    picture[:, 0, 8:16, 4:28] = 1
    whole = crop(picture, torch.tensor([[5 / 32, 9 / 32, 27 / 32, 15 / 32]]), size=16)
    assert whole[0, 0].min() > 0.99 and whole[0, 1:].max() == 0
    half = crop(picture, torch.tensor([[5 / 32, 1 / 32, 27 / 32, 15 / 32]]), size=16)[0, 0]
    assert half[:7].max() < 0.01 and half[9:].min() > 0.99
    boxes = torch.tensor([[0.3, 0.3, 0.7, 0.6]]).repeat(500, 1)
    moved = jitter(boxes, 0.2, torch.Generator().manual_seed(0)) - boxes
    limits = torch.tensor([0.4, 0.3, 0.4, 0.3]) * 0.2
    assert (moved.abs() <= limits + 1e-6).all()
    assert (moved[:, :2].mean(0) < 0).all() and (moved[:, 2:].mean(0) > 0).all()


def test_the_corpus_holds_each_scene_with_its_words(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    corpus = draw_corpus(16, 1, torch.device("cpu"), tokenizer)
    assert isinstance(corpus, Corpus) and len(corpus) == 16 and corpus.captions.shape[:2] == (16, 2)
    for row in range(16):
        named = set(tokenizer.decode(corpus.captions[row, 0], skip_special_tokens=True).split())
        assert {THINGS[i] for i in corpus.identities.thing[row, : corpus.count[row]].tolist()} <= named


def test_a_caption_says_things_by_words_of_their_own(tmp_path):
    scenes = sample_scenes(200, torch.Generator().manual_seed(0))
    assert captions(scenes, seed=1) == captions(scenes, seed=1, words=0)
    texts = captions(scenes, seed=1, words=0.6)
    tokenizer = build_tokenizer(tmp_path)
    ids, slots = tokenise_captions(tokenizer, texts)
    rows, places = (slots >= 0).nonzero(as_tuple=True)
    assert 0.5 < len(rows) / scenes.count.sum() < 0.7
    said = scenes.identities.thing[rows, slots[rows, places]]
    things = torch.tensor([tokenizer(thing).input_ids[1] for thing in THINGS])
    assert torch.equal(ids[rows, places], things[said])  # under the class word of the very thing
    bare = torch.isin(ids[rows, places - 1], torch.tensor(tokenizer("a an").input_ids[1:3])).logical_not()
    assert bare.float().mean() > 0.7


def test_attributes_tell_what_is_seen():
    identities = crowd(400, torch.Generator().manual_seed(0))
    told = attributes(identities)
    assert told.shape == (400, ATTRIBUTES) and told.abs().max() <= 1
    plain = identities.pattern == 0
    unseen = replace(identities, second=1 - identities.second, phase=1 - identities.phase)
    same = (attributes(unseen) == told).all(1)
    assert same[plain].all() and not same[~plain].any()
    turned = replace(identities, angle=identities.angle + math.pi, phase=-identities.phase)
    torch.testing.assert_close(attributes(turned), told, atol=1e-5, rtol=0)
    torch.testing.assert_close(portraits(turned), portraits(identities), atol=2e-3, rtol=0)


def test_words_lie_around_their_class_word_or_the_mean():
    table, classes = torch.randn(9, WIDTH), torch.tensor([[3, 5]])
    offsets = WordWriter(WIDTH)(torch.randn(1, 2, ATTRIBUTES))
    torch.testing.assert_close(offsets.norm(dim=-1), torch.full((1, 2), OFFSET))
    rows = rows_of_words(table, classes, offsets, torch.tensor([[False, True]]))
    torch.testing.assert_close(rows - offsets, torch.stack([table[3], table.mean(0)])[None])


def test_the_denoiser_learns_words_from_what_they_say(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    corpus = draw_corpus(8, 0, torch.device("cpu"), tokenizer, words=1.0)
    empty = torch.tensor(tokenizer("", padding="max_length").input_ids)
    settings = replace(tiny(["denoiser"], 1), words=1.0)
    latents = torch.randn(8, 4, 32, 32)
    module = DenoiserPretraining(corpus, latents, build_text_encoder(tokenizer), empty, settings)
    batch = module.batch(torch.Generator().manual_seed(0))
    loss = module.objective(*batch)["loss"]
    loss.backward()
    assert all(weight.grad.abs().max() > 0 for weight in module.writer.parameters())
    assert not any("writer" in name for name in module.network.state_dict())  # so that it is not exported
    with torch.no_grad():
        module.writer.layers[-1].bias += 1
        assert module.objective(*batch)["loss"] != loss


def test_without_words_of_their_own_the_denoiser_learns_as_the_shipped_one_did(tmp_path):
    settings = tiny(["denoiser"], 1)
    assert settings.words == 0
    tokenizer = build_tokenizer(tmp_path)
    corpus = draw_corpus(8, 0, torch.device("cpu"), tokenizer, words=settings.words)
    empty = torch.tensor(tokenizer("", padding="max_length").input_ids)
    latents = torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    module = DenoiserPretraining(corpus, latents, build_text_encoder(tokenizer), empty, settings)
    clean, noise, timesteps, _, ids, *_ = batch = module.batch(torch.Generator().manual_seed(0))
    assert (timesteps < 500).any()
    alpha = build_scheduler().alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    predicted = module.network(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, timesteps, ids)
    snr = (alpha / (1 - alpha)).flatten()
    expected = ((predicted - noise).pow(2).mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean()
    torch.testing.assert_close(module.objective(*batch)["loss"], expected)


def test_the_denoiser_goes_on_from_a_pipeline(tmp_path):
    with pytest.raises(MifoError, match=r"pretraining\.words=1\.5"):
        pretrain(replace(tiny([], 1), words=1.5), tmp_path / "work", tmp_path, CPU, logger=False)
    with pytest.raises(MifoError, match=r"pretraining\.start"):
        pretrain(replace(tiny([], 1), start=str(tmp_path)), tmp_path / "work", tmp_path, CPU, logger=False)
    settings = replace(tiny(["denoiser"], 1), start="embedded", words=0.6)
    settings.denoiser.learning_rate = 0.0
    pretrain(settings, tmp_path / "work", tmp_path / "weights", CPU, logger=False)
    for file in (WEIGHTS / "pipeline").rglob("*.safetensors"):
        made = load_file(tmp_path / "weights" / "pipeline" / file.relative_to(WEIGHTS / "pipeline"))
        assert all(torch.equal(made[name], value) for name, value in load_file(file).items())


@pytest.mark.slow
def test_the_transformer_goes_on_from_its_checkpoint_and_is_an_ordinary_pipeline(tmp_path):
    for steps in (2, 3):
        settings = replace(tiny(["transformer"], steps), start="embedded")
        assert pretrain(settings, tmp_path / "work", tmp_path / "weights", CPU, logger=False) == {
            "transformer": True
        }
    checkpoint = torch.load(tmp_path / "work" / "transformer" / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 3
    folder = tmp_path / "weights" / "pipeline_mmdit"
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert size < 35e6  # all weights in the repository stay below 95 MB
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.to(torch.float32).set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 2, "latents": noise, "output_type": "latent", "max_sequence_length": 0}
    with torch.no_grad():
        (expected,) = pipeline("a photo of a red car", guidance_scale=3.0, **options).images
        model = load_model(ModelSettings("mmdit", str(folder)))
        prompts = model.encode_prompts(["", "a photo of a red car"])
        found = Sampler(model, SynthesisSettings(2, 3.0), GuidanceSettings())(prompts, noise)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    assert len(model.sites) == 18 and model.sites[0].size == (16, 16) and model.image_size == 128
    assert model.decode_latents(found).shape == (1, 3, 128, 128)


def test_finished_parts_are_taken_over_from_another_run(tmp_path):
    run, work = tmp_path / "run", tmp_path / "work"
    with pytest.raises(MifoError, match=r"pretraining\.after"):
        pretrain(replace(tiny([], 1), after=str(run)), work, tmp_path / "weights", CPU, logger=False)
    (run / "checkpoints").mkdir(parents=True)
    pretrain(tiny(["segmenter"], 1), run / "checkpoints", tmp_path / "first", CPU, logger=False)
    pretrain(replace(tiny([], 1), after=str(run)), work, tmp_path / "weights", CPU, logger=False)
    taken, made = (
        load_segmenter(tmp_path / name / "segmenter").state_dict() for name in ("weights", "first")
    )
    assert all(torch.equal(taken[name], made[name]) for name in made)


@pytest.mark.slow
def test_the_decoder_learns_and_the_latents_stay(made):
    before, after = (made[2][part] for part in ("autoencoder", "decoder"))
    moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert moved and moved <= {"decoder", "post_quant_conv"}


def test_siblings_look_more_alike_than_strangers_and_a_thing_like_itself():
    generator = torch.Generator().manual_seed(0)
    strangers = crowd(240, generator)
    family = with_siblings(strangers, generator)
    assert torch.equal(family[::2].body, strangers[::2].body)
    shown = portraits(family)
    assert shown.shape == (240, 3, 32, 32) and shown.min() >= 0 and shown.max() <= 1
    alike = likeness(shown)
    torch.testing.assert_close(alike.diagonal(), torch.ones(240), rtol=0, atol=1e-4)
    assert (alike - alike.T).abs().max() < 1e-4 and alike.min() >= 0
    younger = torch.arange(1, 240, 2)
    assert torch.equal(family.thing[younger], family.thing[younger - 1])
    same = (family.thing[:, None] == family.thing) & ~torch.eye(240, dtype=torch.bool)
    same[younger, younger - 1] = same[younger - 1, younger] = False
    assert alike[younger, younger - 1].mean() > 0.4 > 2 * alike[same].mean()
    other = family.thing[:, None] != family.thing
    assert alike[other].mean() < 0.05


def test_augmented_pictures_stay_pictures_and_repeat_by_seed():
    pictures = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for change in (warp, repaint, soften):
        once, again, other = (change(pictures, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert once.shape == pictures.shape and torch.equal(once, again) and not torch.equal(once, other)
        assert once.min() > -0.3 and once.max() < 1.4
    ramp = torch.linspace(0, 1, 32).expand(64, 3, 32, 32)
    rising = (warp(ramp, torch.Generator().manual_seed(0))[..., -1] > 0.5).float().mean((1, 2)).round()
    assert 16 < rising.sum() < 48  # about half are mirrored
    still = warp(torch.full((2, 3, 32, 32), 0.3), torch.Generator().manual_seed(0))
    torch.testing.assert_close(still, torch.full((2, 3, 32, 32), 0.3))
    grey = repaint(torch.full((2, 3, 8, 8), 0.3), torch.Generator().manual_seed(0))
    torch.testing.assert_close(grey, torch.full((2, 3, 8, 8), 0.3))
