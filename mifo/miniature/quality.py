"""How good the miniature is, on scenes that it was never trained on.

Every figure comes with its 95 % interval: the normal approximation for means, Wilson's for shares.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from scipy import ndimage
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou
from transformers import AutoTokenizer, ViTModel

from mifo.data.layouts import Layout
from mifo.miniature.pretraining.clip import PAIRS, normalise
from mifo.miniature.pretraining.corpus import crop, crowd, draw_corpus, draw_views, jitter, tokenise
from mifo.miniature.pretraining.segmenter import Segmenter, class_maps
from mifo.world.scenes import SceneBatch, caption, describe, draw, mask_boxes, sample_scenes
from mifo.world.vocabulary import BACKGROUNDS, COLOURS, THINGS

HELD_OUT_SEED = 1_000_003
"""Seed of the scenes for judging; pretraining draws from small seeds."""

BOX_SEED = HELD_OUT_SEED + 3
"""Seed of the scenes whose boxes and words box control asks for."""


TARGETS = {
    "vae psnr": 32.0,
    "clip thing": 0.99,
    "clip colour": 0.95,
    "clip background": 0.98,
    "vit top-1 of its category": 0.95,
    "one thing: thing": 0.97,
    "one thing: colour": 0.90,
    "one thing: background": 0.97,
    "two things: both present": 0.90,
    "box control: all things in their boxes": 0.85,
}
"""The least that each measure should reach; measures that are not here explain others."""


def share(hits: Tensor) -> dict[str, float]:
    """Share of true entries with Wilson's 95 % interval."""
    n, true = hits.numel(), int(hits.sum())
    low, high = binomtest(true, n).proportion_ci(method="wilson")
    return {"value": true / n, "low": float(low), "high": float(high), "n": n}


def mean(values: Tensor) -> dict[str, float]:
    """Mean with its 95 % interval."""
    n, average = values.numel(), values.double().mean().item()
    half = 1.96 * values.double().std().item() / math.sqrt(n)
    return {"value": average, "low": average - half, "high": average + half, "n": n}


class Judge:
    """The miniature's CLIP asked which of several words a picture shows."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model = open_clip.create_model(f"local-dir:{folder}").to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.device = device

    @torch.no_grad()
    def pictures(self, images: Tensor, batch: int = 512) -> Tensor:
        """Unit features (n, d) of pictures (n, 3, 128, 128), uint8 or in [0, 1]."""
        parts = [
            self.model.encode_image(normalise(images[i : i + batch].to(self.device)), normalize=True)
            for i in range(0, len(images), batch)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        """Unit features (n, d) of prompts."""
        return self.model.encode_text(tokenise(self.tokenizer, prompts).to(self.device), normalize=True)

    def best(self, features: Tensor, prompts: list[str], thing: Tensor | None = None) -> Tensor:
        """The index of the prompt that each picture fits best, (n,).

        Where its `thing` (n,) is known, of that thing's prompts alone; prompts are in the order of things.
        """
        texts = self.texts(prompts)
        if thing is None:
            return (features @ texts.T).argmax(1)
        return torch.einsum("nd,ncd->nc", features, texts.unflatten(0, (len(THINGS), -1))[thing]).argmax(1)

    def which_thing(self, features: Tensor) -> Tensor:
        return self.best(features, [caption([thing], None) for thing in THINGS])

    def which_colour(self, features: Tensor, thing: Tensor) -> Tensor:
        prompts = [caption([describe(t, c, None)], None) for t in THINGS for c in COLOURS]
        return self.best(features, prompts, thing)

    def which_background(self, features: Tensor, thing: Tensor) -> Tensor:
        return self.best(features, [caption([t], b) for t in THINGS for b in BACKGROUNDS], thing)

    def which_pair(self, features: Tensor) -> Tensor:
        """The best two different things for each picture, as indices (n, 2)."""
        best = self.best(features, [caption([THINGS[a], THINGS[b]], None) for a, b in PAIRS])
        return torch.tensor(PAIRS, device=features.device)[best]


@torch.no_grad()
def evaluators(weights: Path, device: torch.device, scenes: int, per_category: int) -> dict:
    """Zero-shot accuracy of the CLIP and top-1 identification by the ViT."""
    judge = Judge(weights / "clip", device)
    corpus = draw_corpus(scenes, HELD_OUT_SEED, device, judge.tokenizer, variants=1)
    single = torch.nonzero(corpus.count == 1).squeeze(1)
    generator = torch.Generator(device).manual_seed(HELD_OUT_SEED)
    crops = crop(corpus.images[single].float() / 255, jitter(corpus.boxes[single, 0], 0.15, generator))
    features, whole = judge.pictures(crops), judge.pictures(corpus.images[single])
    known = corpus.identities
    thing = known.thing[single, 0]
    out = {
        "clip thing": share(judge.which_thing(features) == thing),
        "clip colour": share(judge.which_colour(features, thing) == known.colour[single, 0]),
        "clip background": share(judge.which_background(whole, thing) == corpus.background[single]),
        "clip thing, whole picture": share(judge.which_thing(whole) == thing),
        "clip colour, whole picture": share(judge.which_colour(whole, thing) == known.colour[single, 0]),
    }
    double = torch.nonzero((corpus.count == 2) & (known.thing[:, 0] != known.thing[:, 1])).squeeze(1)
    pairs = judge.which_pair(judge.pictures(corpus.images[double])).sort(1).values
    both = known.thing[double, :2].sort(1).values
    out["clip both things, whole picture"] = share((pairs == both).all(1))
    vit = ViTModel.from_pretrained(weights / "vit", add_pooling_layer=False, dtype=torch.float32)
    vit = vit.to(device).eval()
    people = crowd(per_category * len(THINGS), generator, held_out=True)
    index = torch.arange(len(people.thing), device=device)
    reference, found = (
        F.normalize(
            vit(pixel_values=normalise(draw_views(people, index, generator, on_black=black)))[0][:, 0], dim=-1
        )
        for black in (True, False)
    )
    scores = (found @ reference.T).masked_fill(people.thing[:, None] != people.thing[None], -2)
    out["vit top-1 of its category"] = share(scores.argmax(1) == index)
    return out


@torch.no_grad()
def generate(
    pipeline: DiffusionPipeline, prompts: list[str], seed: int, steps: int, scale: float, batch: int = 128
) -> Tensor:
    """Plain samples (n, 3, H, W) in [0, 1], by the pipeline's own scheduler."""
    # no zeros for the T5 that the miniature never had
    options = {"max_sequence_length": 0} if isinstance(pipeline, StableDiffusion3Pipeline) else {}
    out = []
    for start in range(0, len(prompts), batch):
        made = pipeline(
            prompts[start : start + batch],
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=torch.Generator("cpu").manual_seed(seed + start),
            output_type="pt",
            **options,
        )
        out.append(made.images.float())
    return torch.cat(out)


def load_pipeline(folder: Path, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    kind = DiffusionPipeline.load_config(folder)["_class_name"]
    three = kind == StableDiffusion3Pipeline.__name__
    lacking = {"text_encoder_3": None, "tokenizer_3": None} if three else {"safety_checker": None}
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **lacking)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@torch.no_grad()
def reconstruction(pipeline: DiffusionPipeline, scenes: int) -> dict:
    """PSNR in dB of pictures after encoding and decoding, peak 1."""
    corpus = draw_corpus(scenes, HELD_OUT_SEED + 1, pipeline.device, pipeline.tokenizer, variants=1)
    values = []
    for start in range(0, scenes, 64):
        images = corpus.images[start : start + 64].float() / 255
        latents = pipeline.vae.encode((images * 2 - 1).to(pipeline.vae.dtype)).latent_dist.mean
        decoded = (pipeline.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)
        values.append(-10 * (decoded - images).pow(2).mean((1, 2, 3)).log10())
    return {"vae psnr": mean(torch.cat(values))}


def text_to_image(pipeline: DiffusionPipeline, judge: Judge, pictures: int, scale: float, steps: int) -> dict:
    """One thing: thing, colour and background as judged by the CLIP; two things: both present."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)

    def pick(options: int) -> Tensor:
        return torch.randint(options, (pictures,), generator=generator)

    thing, colour, place = pick(len(THINGS)), pick(len(COLOURS)), pick(len(BACKGROUNDS))
    colours = list(COLOURS)
    prompts = [
        caption([describe(THINGS[t], colours[c], None)], BACKGROUNDS[b])
        for t, c, b in zip(thing, colour, place, strict=True)
    ]
    features = judge.pictures(generate(pipeline, prompts, HELD_OUT_SEED, steps, scale))
    thing, colour, place = (index.to(features.device) for index in (thing, colour, place))
    out = {
        "one thing: thing": share(judge.which_thing(features) == thing),
        "one thing: colour": share(judge.which_colour(features, thing) == colour),
        "one thing: background": share(judge.which_background(features, thing) == place),
    }
    chosen = [PAIRS[int(i)] for i in torch.randint(len(PAIRS), (pictures // 2,), generator=generator)]
    prompts = [caption([THINGS[a], THINGS[b]], None) for a, b in chosen]
    found = judge.which_pair(judge.pictures(generate(pipeline, prompts, HELD_OUT_SEED + 7, steps, scale)))
    out["two things: both present"] = share((found.cpu() == torch.tensor(chosen)).all(1))
    return out


def boxed_scenes(n: int, seed: int = BOX_SEED) -> SceneBatch:
    """n held-out scenes of two or three things, all of different categories, whose boxes make layouts."""
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(n, generator, counts=(0.0, 0.5, 0.5, 0.0))
    order = torch.rand(n, len(THINGS), generator=generator).argsort(1)
    scenes.identities.thing = order[:, : scenes.identities.thing.shape[1]]
    return scenes


def boxed_layouts(scenes: SceneBatch, boxes: Tensor) -> list[Layout]:
    """Of each scene its caption in known words, and its things' boxes by their words ("red car")."""
    colours, found = list(COLOURS), []
    for row, count in enumerate(scenes.count.tolist()):
        kinds, hues = (getattr(scenes.identities, name)[row, :count] for name in ("thing", "colour"))
        words = [describe(THINGS[t], colours[c], None) for t, c in zip(kinds, hues, strict=True)]
        places = [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes[row, :count].tolist()]
        prompt = caption(words, BACKGROUNDS[int(scenes.background[row])])
        found.append(Layout(prompt, dict(zip(words, places, strict=True))))
    return found


def drawn_extents(model: Segmenter, images: Tensor, things: Tensor) -> Tensor:
    """Where each category is seen in its picture: boxes (n, K, 4) for categories `things` (n, K).

    The box lies around all connected parts of the category's pixels that are at least a quarter of its
    largest part, so that a second copy elsewhere counts against the picture and a stray pixel does not. A
    category that is not seen has the empty box (0, 0, 0, 0).
    """
    return class_extents(class_maps(model, images).cpu(), things)


def class_extents(maps: Tensor, things: Tensor) -> Tensor:
    """As `drawn_extents`, of pictures whose classes (n, H, W) are known."""
    extents = torch.zeros(*things.shape, 4)
    for row, classes in enumerate(maps):
        for column, thing in enumerate(things[row].tolist()):
            labels, parts = ndimage.label((classes == thing).numpy(), structure=np.ones((3, 3)))
            if parts:
                sizes = np.bincount(labels.ravel())[1:]
                kept = 1 + np.flatnonzero(sizes >= sizes.max() / 4)
                extents[row, column] = mask_boxes(torch.from_numpy(np.isin(labels, kept)).float())
    return extents


def agreement(scenes: SceneBatch, boxes: Tensor, extents: Tensor) -> list[Tensor]:
    """IoU of each thing's extent with its box, one tensor (count,) for each scene."""
    return [
        box_iou(extents[row, :count], boxes[row, :count]).diagonal()
        for row, count in enumerate(scenes.count.tolist())
    ]


def box_control(
    model: Segmenter,
    make: Callable[[list[Layout]], Tensor],
    prompts: int,
    calibration: int = 512,
    seed: int = BOX_SEED,
) -> tuple[dict, list[Layout], Tensor]:
    """Are known words drawn inside their boxes?

    Boxes are those of drawn scenes, so that they have the proportions of their things. A picture counts when
    every thing's extent, found by the segmenter, has IoU over 0.5 with its box. The segmenter itself is
    judged on drawings whose boxes are known.

    Args:
        make: makes one picture (3, H, W) for each layout. seed: of the scenes.

    Returns:
        The measures, the layouts, and their pictures (prompts, 3, H, W).
    """

    def all_placed(found: list[Tensor]) -> dict[str, float]:
        return share(torch.stack([(overlaps > 0.5).all() for overlaps in found]))

    scenes = boxed_scenes(calibration, HELD_OUT_SEED + 5)
    drawings, masks = draw(scenes)
    found = agreement(scenes, mask_boxes(masks), drawn_extents(model, drawings, scenes.identities.thing))
    out = {
        "segmenter on drawings: IoU of extent and true box": mean(torch.cat(found)),
        "segmenter on drawings: all extents over 0.5": all_placed(found),
    }
    scenes = boxed_scenes(prompts, seed)
    boxes = mask_boxes(draw(scenes)[1])
    layouts = boxed_layouts(scenes, boxes)
    pictures = make(layouts)
    found = agreement(scenes, boxes, drawn_extents(model, pictures, scenes.identities.thing))
    out["box control: all things in their boxes"] = all_placed(found)
    for count in (2, 3):
        if chosen := [overlaps for overlaps in found if len(overlaps) == count]:
            out[f"box control: all of {count} things in their boxes"] = all_placed(chosen)
    out["box control: a thing in its box"] = share(torch.cat(found) > 0.5)
    out["box control: IoU of extent and box"] = mean(torch.cat(found))
    return out, layouts, pictures
