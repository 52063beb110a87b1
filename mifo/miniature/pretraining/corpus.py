"""The pretraining corpus: scenes drawn once and kept on the device, with truth and tokenised captions."""

import dataclasses
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from mifo.backbones.clip import END_OF_WORD
from mifo.miniature.tokenizer import MAX_LENGTH
from mifo.world.scenes import (
    SIZE,
    SLOT_MARK,
    Identities,
    Placements,
    SceneBatch,
    captions,
    draw,
    mask_boxes,
    sample_identities,
    sample_scenes,
)

CHUNK = 2048
"""Scenes drawn in one call: thousands of small kernels cost the same for one scene or for hundreds."""


@dataclass
class Corpus:
    """n scenes: images uint8 (n, 3, H, W), boxes (n, T, 4), what the things are (n, T), captions (n, V, L).

    ``cover`` is the share of each latent's pixels that things cover, uint8 (n, H/4, W/4) of 255. ``slots``
    (n, V, L) is the slot of the thing that a token of a caption says by itself, -1 for ordinary words.
    """

    images: Tensor
    cover: Tensor
    boxes: Tensor
    identities: Identities
    count: Tensor
    background: Tensor
    captions: Tensor
    slots: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def pick(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n scenes and one of the captions of each: their indices, (n,) both."""
        rows, variants = (
            torch.randint(limit, (n,), generator=generator, device=generator.device)
            for limit in self.captions.shape[:2]
        )
        return rows, variants


def tokenise(tokenizer, texts: list[str]) -> Tensor:
    """Prompts → token ids (n, L), padded to the tokenizer's length."""
    return torch.tensor(
        tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True).input_ids
    )


def tokenise_captions(tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Captions, whose every word is one token → ids (n, L), and the slots (n, L) that tokens mark, else -1.

    20 times faster than ``tokenise`` over a whole corpus.
    """
    vocabulary = tokenizer.get_vocab()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids, slots = [], []
    for text in texts:
        words = [word.partition(SLOT_MARK) for word in text.lower().split()]
        padding = MAX_LENGTH - 1 - len(words)
        ids.append([start, *(vocabulary[word + END_OF_WORD] for word, _, _ in words)] + [end] * padding)
        slots.append([-1, *(int(slot or -1) for _, _, slot in words)] + [-1] * padding)
    return torch.tensor(ids), torch.tensor(slots)


def draw_corpus(
    n: int, seed: int, device: torch.device, tokenizer, variants: int = 2, words: float = 0.0
) -> Corpus:
    """Draw ``n`` pretraining scenes; each gets ``variants`` captions that leave out different words.

    ``words`` is the share of things that a caption says by a word of their own, see ``captions``.
    """
    generator = torch.Generator(device).manual_seed(seed)
    images = torch.empty(n, 3, SIZE, SIZE, dtype=torch.uint8, device=device)
    parts: list[tuple[Tensor, ...]] = []
    texts: list[list[str]] = [[] for _ in range(variants)]
    for start in track(range(0, n, CHUNK), "drawing scenes"):
        scenes = sample_scenes(min(CHUNK, n - start), generator)
        pictures, masks = draw(scenes)
        images[start : start + len(pictures)] = (pictures * 255).round().to(torch.uint8)
        cover = (F.avg_pool2d(masks.amax(1), 4) * 255).round().to(torch.uint8)
        traits = (getattr(scenes.identities, field.name) for field in dataclasses.fields(Identities))
        parts.append((cover, mask_boxes(masks), scenes.count, scenes.background, *traits))
        for variant in range(variants):
            texts[variant] += captions(scenes, seed * 1_000_003 + start * variants + variant, words=words)
    read = [tokenise_captions(tokenizer, column) for column in texts]
    ids, slots = (torch.stack(column, 1).to(device) for column in zip(*read, strict=True))
    cover, boxes, count, background, *identities = (torch.cat(column) for column in zip(*parts, strict=True))
    return Corpus(images, cover, boxes, Identities(*identities), count, background, ids, slots)


def crop(images: Tensor, boxes: Tensor, size: int = SIZE) -> Tensor:
    """Cut boxes [x0, y0, x1, y1] in [0, 1], (n, 4), out of images (n, 3, H, W) and stretch them to size²."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    theta = torch.zeros(len(boxes), 2, 3, device=boxes.device)
    theta[:, 0, 0], theta[:, 1, 1] = x1 - x0, y1 - y0
    theta[:, 0, 2], theta[:, 1, 2] = x0 + x1 - 1, y0 + y1 - 1
    grid = F.affine_grid(theta, [len(boxes), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False, padding_mode="border")


def jitter(boxes: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Move each edge of the boxes by up to ``amount`` of the box's side, outwards more than inwards."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    outwards = torch.tensor([-1.0, -1.0, 1.0, 1.0], device=boxes.device)
    moves = torch.rand(boxes.shape, generator=generator, device=boxes.device) * 1.3 - 0.3
    return (boxes + outwards * moves * sides * amount).clamp(0, 1)


def same_identity(identities: Identities, index: Tensor, scenes: SceneBatch) -> SceneBatch:
    """``scenes`` with the identities ``index`` of ``identities`` in their first slot."""
    placed = {}
    for field in dataclasses.fields(Identities):
        values = getattr(scenes.identities, field.name).clone()
        values[:, 0] = getattr(identities, field.name)[index]
        placed[field.name] = values
    return dataclasses.replace(scenes, identities=Identities(**placed))


def draw_views(identities: Identities, index: Tensor, generator: torch.Generator, on_black: bool) -> Tensor:
    """Box crops (m, 3, H, W) uint8 of the named identities, each in a new scene, pose and company.

    With ``on_black`` everything but the instance is black, as references are prepared for the evaluators.
    """
    out = []
    for start in range(0, len(index), CHUNK):
        rows = index[start : start + CHUNK]
        scenes = same_identity(identities, rows, sample_scenes(len(rows), generator))
        images, masks = draw(scenes)
        mask = masks[:, 0]
        if on_black:
            images = images * mask.unsqueeze(1)
        views = crop(images, jitter(mask_boxes(mask), 0.06 if on_black else 0.22, generator))
        out.append((views * 255).round().to(torch.uint8))
    return torch.cat(out)


def crowd(n: int, generator: torch.Generator, held_out: bool = False) -> Identities:
    """n identities (n,) of every category, in equal parts and sorted by category."""
    identities = sample_identities((n,), generator, held_out)
    identities.thing = identities.thing.sort().values
    return identities


def with_siblings(identities: Identities, generator: torch.Generator) -> Identities:
    """Every other identity (n,) is made a sibling of the one before it: the same thing, changed a little.

    Each of its traits goes by a random share, mostly small, towards that of the identity it was; one sibling
    in six wears another pattern.
    """
    device = identities.thing.device
    younger = torch.arange(len(identities.thing), device=device) % 2 == 1
    elder = identities[(torch.arange(len(younger), device=device) - 1).clamp(min=0)]

    def uniform() -> Tensor:
        return torch.rand(len(younger), generator=generator, device=device)

    traits = {}
    for field in dataclasses.fields(Identities):
        own, inherited = getattr(identities, field.name), getattr(elder, field.name)
        if own.is_floating_point():
            share = (uniform() ** 3).view(-1, *[1] * (own.ndim - 1))
            child = torch.lerp(inherited, own, share)
        else:
            changed = uniform() < (1 / 6 if field.name == "pattern" else 0)
            child = torch.where(changed, own, inherited)
        traits[field.name] = torch.where(younger.view(-1, *[1] * (own.ndim - 1)), child, own)
    return Identities(**traits)


def portraits(identities: Identities, size: int = 32) -> Tensor:
    """Each identity (n,) by itself on black, all in the same pose: (n, 3, size, size) in [0, 1]."""
    device = identities.thing.device
    out = []
    for rows in torch.arange(len(identities.thing), device=device).split(CHUNK):
        n = len(rows)
        pose = Placements(
            centre=torch.full((n, 1, 2), 0.5, device=device),
            size=torch.full((n, 1), 0.46, device=device),
            turn=torch.zeros(n, 1, device=device),
            mirror=torch.ones(n, 1, device=device),
        )
        alone = SceneBatch(
            identities=identities[rows.unsqueeze(1)],
            placements=pose,
            count=torch.ones(n, dtype=torch.long, device=device),
            background=torch.zeros(n, dtype=torch.long, device=device),
            variation=torch.zeros(n, 5, device=device),
        )
        out.append(draw(alone, size, with_background=False)[0])
    return torch.cat(out)
