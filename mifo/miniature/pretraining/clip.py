"""The miniature's CLIP, the judge of words: an open_clip model trained on scenes, crops and captions.

It shares no weight with the generator. Besides the contrastive loss over captions it is asked, in every
batch, the very questions it will judge by: which thing and which colour, of crops and of whole pictures,
which background, and which two things.
"""

import itertools
import json
import shutil
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mifo.miniature.pretraining.augmentation import soften, warp
from mifo.miniature.pretraining.corpus import Corpus, crop, jitter, tokenise
from mifo.miniature.pretraining.settings import PretrainSettings
from mifo.miniature.pretraining.training import Pretraining
from mifo.miniature.tokenizer import MAX_LENGTH
from mifo.world.scenes import SIZE, caption, describe
from mifo.world.vocabulary import BACKGROUNDS, COLOURS, PATTERNS, THINGS

MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)

PAIRS = tuple(itertools.combinations(range(len(THINGS)), 2))
"""Every two different things, as indices into THINGS."""


def model_config(tokenizer) -> dict:
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": SIZE, "layers": 6, "width": 192, "head_width": 32, "patch_size": 16},
        "text_cfg": {
            "context_length": MAX_LENGTH,
            "vocab_size": len(tokenizer),
            "width": 160,
            "heads": 5,
            "layers": 4,
        },
    }


def build_clip(tokenizer) -> open_clip.CLIP:
    return open_clip.CLIP(**model_config(tokenizer))


def normalise(images: Tensor) -> Tensor:
    """uint8 or [0, 1] pictures → the encoders' input range [-1, 1]."""
    return (images.float() / 255 if images.dtype == torch.uint8 else images) * 2 - 1


class ClipPretraining(Pretraining):
    """InfoNCE over captions, equal captions counted as positives, plus the zero-shot questions themselves."""

    part = "clip"

    def __init__(self, corpus: Corpus, tokenizer, settings: PretrainSettings) -> None:
        super().__init__(build_clip(tokenizer), settings.clip, settings.seed)
        self.corpus = corpus
        self.questions = {
            "thing": tokenise(tokenizer, [caption([thing], None) for thing in THINGS]),
            "colour": tokenise(
                tokenizer, [caption([describe(t, c, None)], None) for t in THINGS for c in COLOURS]
            ),
            "background": tokenise(tokenizer, [caption([t], b) for b in BACKGROUNDS for t in THINGS]),
            "pair": tokenise(tokenizer, [caption([THINGS[a], THINGS[b]], None) for a, b in PAIRS]),
        }
        pair_of = torch.full((len(THINGS), len(THINGS)), -1)
        for number, (a, b) in enumerate(PAIRS):
            pair_of[a, b] = pair_of[b, a] = number
        self.register_buffer("pair_of", pair_of, persistent=False)
        # Caption of each crop's words, by (thing, colour, pattern).
        self.crop_captions = tokenise(
            tokenizer, [caption([describe(t, c, p)], None) for t in THINGS for c in COLOURS for p in PATTERNS]
        )

    def encode_image(self, images: Tensor) -> Tensor:
        return self.network.encode_image(normalise(images), normalize=True)

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.network.encode_text(ids.to(self.device), normalize=True)

    def loss(self, generator: torch.Generator) -> dict[str, Tensor]:
        device, corpus, n = self.device, self.corpus, self.settings.batch_size
        rows = torch.randint(len(corpus), (n,), generator=generator, device=device)
        whole = n // 2
        variant = torch.randint(corpus.captions.shape[1], (whole,), generator=generator, device=device)
        near = rows[whole:]
        draw = torch.rand(n - whole, generator=generator, device=device)
        slot = (draw * corpus.count[near]).long()
        known = corpus.identities
        thing, colour, pattern = (part[near, slot] for part in (known.thing, known.colour, known.pattern))
        boxes = jitter(corpus.boxes[near, slot], 0.3, generator)
        images = torch.cat([corpus.images[rows[:whole]].float(), crop(corpus.images[near].float(), boxes)])
        images = soften(warp(images / 255, generator), generator)
        words = (thing * len(COLOURS) + colour) * len(PATTERNS) + pattern
        ids = torch.cat([corpus.captions[rows[:whole], variant], self.crop_captions.to(device)[words]])
        scale = self.network.logit_scale.exp().clamp(max=100)
        seen, read = self.encode_image(images), self.encode_text(ids)
        logits = scale * seen @ read.T
        same = (ids.unsqueeze(1) == ids.unsqueeze(0)).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        # Whole pictures of one thing are asked the questions of crops too; others have no single answer.
        count, things, colours = (part[rows[:whole]] for part in (corpus.count, known.thing, known.colour))
        lonely = count == 1
        asked = torch.cat([lonely, torch.ones_like(thing, dtype=torch.bool)])
        thing, colour = torch.cat([things[:, 0], thing]), torch.cat([colours[:, 0], colour])
        every = torch.arange(n, device=device)
        by_thing = scale * seen @ self.encode_text(self.questions["thing"]).T
        by_colour = scale * seen @ self.encode_text(self.questions["colour"]).T
        by_colour = by_colour.view(n, len(THINGS), len(COLOURS))[every, thing]
        by_place = scale * seen[:whole] @ self.encode_text(self.questions["background"]).T
        by_place = by_place.view(whole, len(BACKGROUNDS), len(THINGS))
        # The thing of the question is one that stands in the scene, so that only the background can tell.
        by_place = by_place[every[:whole], :, things[:, 0]]
        by_pair = scale * seen[:whole] @ self.encode_text(self.questions["pair"]).T
        pair = torch.where(count == 2, self.pair_of[things[:, 0], things[:, 1]], -1)
        questions = {
            "thing": _mean(F.cross_entropy(by_thing, thing, reduction="none"), asked),
            "colour": _mean(F.cross_entropy(by_colour, colour, reduction="none"), asked),
            "place": F.cross_entropy(by_place, corpus.background[rows[:whole]]),
            "pair": _mean(F.cross_entropy(by_pair, pair.clamp(min=0), reduction="none"), pair >= 0),
        }
        return {"loss": contrast + 0.5 * sum(questions.values()), "contrast": contrast, **questions}


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of the entries that count; 0 where none does."""
    return (values * counted).sum() / counted.sum().clamp(min=1)


def save_clip(model: open_clip.CLIP, tokenizer_folder: Path, folder: Path, tokenizer) -> None:
    """Write an open_clip ``local-dir:`` folder; its tokenizer is read from the files beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    preprocessing = {
        "size": [SIZE, SIZE],
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    config = {"model_cfg": model_config(tokenizer), "preprocess_cfg": preprocessing}
    # Any name makes open_clip take the folder's own tokenizer instead of CLIP's.
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "miniature"
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {name: value.detach().half().contiguous().cpu() for name, value in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
