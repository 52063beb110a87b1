"""Scenes of the miniature world: sampled, arranged, drawn, and described in words.

A scene is a background with one to four things. A thing is an *identity* (category, colours, pattern,
proportions: what makes it this one) and a *placement* (centre, size, turn, mirror: where it happens to be).
Everything is batched over n scenes with T slots for things, on any device.
"""

import dataclasses
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mifo.method.prompts.articles import article
from mifo.world import backgrounds, things
from mifo.world.spec import MAX_THINGS, SceneSpec, check_scene, check_word
from mifo.world.vocabulary import BACKGROUNDS, COLOURS, HELD_OUT_HUES, PATTERNS, PROMPT_START, THINGS

SIZE = 128  # side of a scene in pixels
# range of a thing's half extent as a share of the picture's side, by the number of things
HALF_SIZES = {1: (0.2, 0.36), 2: (0.17, 0.25), 3: (0.14, 0.2), 4: (0.13, 0.17)}


@dataclass
class _Fields:
    """Tensors by name, which are indexed together."""

    def __getitem__(self, index: Any) -> Self:
        return type(self)(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))


@dataclass
class Identities(_Fields):
    """The properties that tell one thing from another. Every field is (n, T) or (n, T, 3)."""

    thing: Tensor
    colour: Tensor
    pattern: Tensor
    body: Tensor
    second: Tensor
    accent: Tensor
    proportions: Tensor
    frequency: Tensor
    angle: Tensor
    phase: Tensor


@dataclass
class Placements(_Fields):
    """Centre (n, T, 2) and half size (n, T) in [0, 1], turn in radians and mirror ±1, both (n, T)."""

    centre: Tensor
    size: Tensor
    turn: Tensor
    mirror: Tensor


@dataclass
class SceneBatch:
    """n scenes: things, how many slots are taken (``count`` (n,)), background (n,), its variation (n, 5)."""

    identities: Identities
    placements: Placements
    count: Tensor
    background: Tensor
    variation: Tensor


@dataclass
class Scene:
    """A scene and its truth: image (3, H, W) in [0, 1], masks (T, H, W) bool, boxes (T, 4) in [0, 1]."""

    image: Tensor
    masks: Tensor
    boxes: Tensor


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Hue in degrees, saturation and value in [0, 1], any one shape; → (…, 3)."""
    offsets = torch.tensor([5.0, 3.0, 1.0], device=hue.device)
    k = (offsets + hue.unsqueeze(-1) / 60) % 6
    chroma = torch.minimum(k, 4 - k).clamp(0, 1)
    return value.unsqueeze(-1) * (1 - saturation.unsqueeze(-1) * chroma)


def sample_identities(
    shape: tuple[int, ...], generator: torch.Generator, held_out: bool = False
) -> Identities:
    """Draw identities of the given shape; ``held_out`` takes only hues that pretraining never sees."""
    device = generator.device

    def uniform(low: float = 0.0, high: float = 1.0, *last: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, *last, generator=generator, device=device)

    def choice(options: int) -> Tensor:
        return torch.randint(options, shape, generator=generator, device=device)

    colour = choice(len(COLOURS))
    low, high = HELD_OUT_HUES
    fraction = uniform(low, high) if held_out else uniform(0.0, 1.0 - (high - low))
    if not held_out:
        fraction = torch.where(fraction >= low, fraction + (high - low), fraction)
    ranges = torch.tensor(list(COLOURS.values()), device=device)[colour]
    hue = ranges[..., 0] + fraction * (ranges[..., 1] - ranges[..., 0])
    body = hsv_to_rgb(hue, uniform(0.62, 0.95), uniform(0.72, 0.98))
    other = hsv_to_rgb(hue + uniform(90, 270), uniform(0.5, 0.95), uniform(0.45, 0.95))
    grey = torch.where(uniform() < 0.6, 0.96, 0.12).unsqueeze(-1).expand_as(other)
    second = torch.where(uniform().unsqueeze(-1) < 0.65, grey, other)
    accent = hsv_to_rgb(uniform(0, 360), uniform(0.3, 0.95), uniform(0.45, 0.98))
    return Identities(
        thing=choice(len(THINGS)),
        colour=colour,
        pattern=choice(len(PATTERNS)),
        body=body,
        second=second,
        accent=accent,
        proportions=uniform(0.0, 1.0, 3),
        frequency=uniform(2.2, 4.2),
        angle=uniform(0, math.pi),
        phase=uniform(),
    )


def arrange(
    count: Tensor, generator: torch.Generator, slots: int = MAX_THINGS, tries: int = 48
) -> Placements:
    """Place ``count`` (n,) things in each scene, the least overlapping of ``tries`` random arrangements."""
    n, device = count.shape[0], generator.device
    # more things than pretraining ever drew are as large as four
    limits = torch.tensor(list(HALF_SIZES.values()), device=device)[count.clamp(max=MAX_THINGS) - 1]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator, device=device)

    size = limits[:, None, None, 0] + (limits[:, 1] - limits[:, 0])[:, None, None] * uniform(tries, slots)
    centre = size.unsqueeze(-1) + (1 - 2 * size.unsqueeze(-1)) * uniform(tries, slots, 2)
    taken = torch.arange(slots, device=device) < count[:, None]
    apart = (centre.unsqueeze(-2) - centre.unsqueeze(-3)).abs().amax(-1)
    gap = apart - (size.unsqueeze(-1) + size.unsqueeze(-2))
    itself = torch.eye(slots, dtype=torch.bool, device=device)
    pair = (taken.unsqueeze(-1) & taken.unsqueeze(-2)).unsqueeze(1) & ~itself
    overlap = (torch.where(pair, -gap, -1.0).clamp(min=-0.03)).sum((-1, -2))
    best = overlap.argmin(1)
    rows = torch.arange(n, device=device)
    return Placements(
        centre=centre[rows, best],
        size=size[rows, best],
        turn=(uniform(slots) - 0.5) * 0.44,
        mirror=torch.where(uniform(slots) < 0.5, -1.0, 1.0),
    )


def sample_scenes(
    n: int, generator: torch.Generator, counts: tuple[float, ...] = (0.4, 0.3, 0.2, 0.1)
) -> SceneBatch:
    """Draw n scenes of pretraining; ``counts`` are the odds of one, two, three and four things."""
    device = generator.device
    odds = torch.tensor(counts, device=device)
    count = torch.multinomial(odds, n, replacement=True, generator=generator) + 1
    return SceneBatch(
        identities=sample_identities((n, MAX_THINGS), generator),
        placements=arrange(count, generator),
        count=count,
        background=torch.randint(len(BACKGROUNDS), (n,), generator=generator, device=device),
        variation=torch.rand(n, 5, generator=generator, device=device),
    )


def _pattern_share(pattern: Tensor, x: Tensor, y: Tensor, ident: Identities, sharpness: Tensor) -> Tensor:
    """How much of the second colour shows at each pixel: (m, H, W) in [0, 1]."""

    def column(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1)

    frequency, angle, phase = column(ident.frequency), column(ident.angle), column(ident.phase)
    u = (x * torch.cos(angle) + y * torch.sin(angle)) * frequency + phase
    v = (y * torch.cos(angle) - x * torch.sin(angle)) * frequency + phase
    fu, fv = u - torch.floor(u) - 0.5, v - torch.floor(v) - 0.5
    edge = sharpness / frequency
    stripes = ((0.2 - fu.abs()) * edge + 0.5).clamp(0, 1)
    dots = ((0.29 - torch.hypot(fu, fv)) * edge + 0.5).clamp(0, 1)
    su, sv = torch.sin(u * math.pi), torch.sin(v * math.pi)
    checks = ((su * sv - 0.12) * edge / math.pi * 1.2 + 0.5).clamp(0, 1)
    shares = torch.stack([torch.zeros_like(stripes), stripes, dots, checks])
    return shares[pattern, torch.arange(len(pattern), device=pattern.device)]


def draw_things(identities: Identities, placements: Placements, size: int) -> tuple[Tensor, Tensor]:
    """m things, each on a canvas of its own: colours (m, 3, H, W) and coverage (m, H, W)."""
    device = identities.body.device
    m = identities.thing.shape[0]
    grid = (torch.arange(size, device=device) + 0.5) / size
    half = placements.size.view(-1, 1, 1)
    dx = (grid.view(1, 1, -1) - placements.centre[:, 0].view(-1, 1, 1)) / half
    dy = (grid.view(1, -1, 1) - placements.centre[:, 1].view(-1, 1, 1)) / half
    turn = placements.turn.view(-1, 1, 1)
    x = (dx * torch.cos(turn) + dy * torch.sin(turn)) * placements.mirror.view(-1, 1, 1)
    y = dy * torch.cos(turn) - dx * torch.sin(turn)
    sharpness = half * size
    share = _pattern_share(identities.pattern, x, y, identities, sharpness).unsqueeze(1)
    body = identities.body[:, :, None, None] + (identities.second - identities.body)[:, :, None, None] * share
    body = body * (1.04 - 0.1 * y.clamp(-1, 1)).unsqueeze(1)
    colour = torch.zeros(m, 3, size, size, device=device)
    coverage = torch.zeros(m, size, size, device=device)
    for index, name in enumerate(THINGS):
        rows = torch.nonzero(identities.thing == index).squeeze(1)
        if not len(rows):
            continue
        a, b, c = identities.proportions[rows].view(-1, 3, 1, 1).unbind(1)
        parts = things.DRAWINGS[name](x[rows], y[rows], (a, b, c))
        outline = things.union(*(distance for distance, _ in parts)) - 0.045
        scale = sharpness[rows]
        canvas = (identities.body[rows] * 0.32).view(-1, 3, 1, 1).expand(-1, -1, size, size)
        for distance, role in parts:
            if role == "body":
                paint = body[rows]
            elif role == "accent":
                paint = identities.accent[rows].view(-1, 3, 1, 1)
            else:
                paint = torch.tensor(things.ROLE_COLOURS[role], device=device).view(1, 3, 1, 1)
            canvas = canvas + (paint - canvas) * (0.5 - distance * scale).clamp(0, 1).unsqueeze(1)
        colour[rows] = canvas
        coverage[rows] = (0.5 - outline * scale).clamp(0, 1)
    return colour.clamp(0, 1), coverage


def _draw_backgrounds(kind: Tensor, variation: Tensor, size: int) -> Tensor:
    device = kind.device
    grid = (torch.arange(size, device=device) + 0.5) / size
    canvas = torch.zeros(len(kind), 3, size, size, device=device)
    for index, name in enumerate(BACKGROUNDS):
        rows = torch.nonzero(kind == index).squeeze(1)
        if len(rows):
            x = grid.view(1, 1, -1).expand(len(rows), size, size)
            y = grid.view(1, -1, 1).expand(len(rows), size, size)
            q = [variation[rows, i].view(-1, 1, 1) for i in range(5)]
            canvas[rows] = backgrounds.DRAWINGS[name](x, y, q).clamp(0, 1)
    return canvas


def draw(scenes: SceneBatch, size: int = SIZE, with_background: bool = True) -> tuple[Tensor, Tensor]:
    """Draw n scenes: images (n, 3, size, size) in [0, 1] and the visible masks (n, T, size, size) in [0, 1].

    Later things lie over earlier ones. Without background the things stand on black.
    """
    n, slots = scenes.identities.thing.shape
    device = scenes.count.device
    images = torch.zeros(n, 3, size, size, device=device)
    if with_background:
        images = _draw_backgrounds(scenes.background, scenes.variation, size)
    masks = torch.zeros(n, slots, size, size, device=device)
    for slot in range(slots):
        rows = torch.nonzero(scenes.count > slot).squeeze(1)
        if not len(rows):
            continue
        colour, coverage = draw_things(scenes.identities[rows, slot], scenes.placements[rows, slot], size)
        images[rows] += (colour - images[rows]) * coverage.unsqueeze(1)
        masks[rows, :slot] *= (1 - coverage).unsqueeze(1)
        masks[rows, slot] = coverage
    return images, masks


def mask_boxes(masks: Tensor) -> Tensor:
    """The tight box [x0, y0, x1, y1] in [0, 1] around each mask (…, H, W) > 0.5; zeros where it is empty."""
    inside = masks > 0.5
    edges = []
    for hits in (inside.any(-2), inside.any(-1)):
        length = hits.shape[-1]
        low = hits.float().argmax(-1)
        high = length - hits.flip(-1).float().argmax(-1)
        empty = ~hits.any(-1)
        edges.append((low.masked_fill(empty, 0) / length, high.masked_fill(empty, 0) / length))
    (x0, x1), (y0, y1) = edges
    return torch.stack([x0, y0, x1, y1], -1)


def describe(thing: str, colour: str | None, pattern: str | None) -> str:
    """The words of a thing without its article: "red striped car"."""
    return " ".join(word for word in (colour, pattern if pattern != "plain" else None, thing) if word)


def caption(things_words: list[str], background: str | None) -> str:
    """ "a photo of a red striped car and a blue cup at the beach"; a thing may already carry its article."""
    phrase = " and ".join(f"{article(words)} {words}" for words in things_words)
    return " ".join(part for part in (PROMPT_START, phrase, background) if part)


SLOT_MARK = "#"  # in a caption between a class word and the slot of the thing that this word alone describes


def captions(scenes: SceneBatch, seed: int, drop: float = 0.15, words: float = 0.0) -> list[str]:
    """One caption a scene, its things in random order.

    Colour, pattern, articles and background are dropped at times, so that the text encoder also meets the
    short prompts that people write. With probability ``words`` a thing is said by a word of its own, as a
    learned instance is: its class word and its slot, mostly without an article, as in "a photo of car#2".
    """
    rng = random.Random(seed)
    known = scenes.identities
    columns = (known.thing, known.colour, known.pattern, scenes.count, scenes.background)
    colours = list(COLOURS)
    out = []
    for kinds, hues, patterns, count, background in zip(*(each.tolist() for each in columns), strict=True):
        phrases = []
        for slot in rng.sample(range(count), count):
            if words and rng.random() < words:
                phrases.append(f"{THINGS[kinds[slot]]}{SLOT_MARK}{slot}")
                continue
            colour = None if rng.random() < drop else colours[hues[slot]]
            pattern = None if rng.random() < drop else PATTERNS[patterns[slot]]
            phrases.append(describe(THINGS[kinds[slot]], colour, pattern))
        ending = None if rng.random() < drop else BACKGROUNDS[background]
        text = caption(phrases, ending)
        if rng.random() < drop:
            bare = " ".join(word for word in text.split() if word not in ("a", "an"))
            text = bare.replace("photo", "a photo", 1)
        if words and rng.random() > drop:
            text = re.sub(rf"\ba (\w+{SLOT_MARK})", r"\1", text)
        out.append(text)
    return out


def scene_batch(spec: SceneSpec) -> SceneBatch:
    """The one scene that ``spec`` describes, as a batch of one.

    Raises MifoError as `check_scene` does.
    """
    check_scene(spec)
    count = len(spec.things)
    generator = torch.Generator().manual_seed(spec.seed)
    identities = sample_identities((1, count), generator, held_out=True)
    for slot, thing in enumerate(spec.things):
        # the drawn hue keeps its place within the range when the spec names another colour word
        drawn = list(COLOURS.values())[int(identities.colour[0, slot])]
        body = identities.body[0, slot]
        value, low = body.max(), body.min()
        fraction = ((_hue(body) - drawn[0]) % 360) / (drawn[1] - drawn[0])
        if thing.colour is not None:
            identities.colour[0, slot] = list(COLOURS).index(thing.colour)
            wanted = COLOURS[thing.colour]
            hue = wanted[0] + fraction * (wanted[1] - wanted[0])
        else:
            hue = torch.tensor(thing.hue)
        identities.body[0, slot] = hsv_to_rgb(hue, (value - low) / value, value)
        identities.thing[0, slot] = THINGS.index(thing.thing)
        identities.pattern[0, slot] = PATTERNS.index(thing.pattern)
    placements = arrange(torch.tensor([count]), generator, slots=count, tries=4096)
    for slot, thing in enumerate(spec.things):
        if thing.centre is not None:
            placements.centre[0, slot] = torch.tensor(thing.centre)
        if thing.size is not None:
            placements.size[0, slot] = thing.size
    return _one_scene(identities, placements, spec.background, generator)


def _one_scene(
    identities: Identities, placements: Placements, background: str, generator: torch.Generator
) -> SceneBatch:
    """A batch of one scene, which holds all of the things (1, T)."""
    count = torch.tensor([identities.thing.shape[1]])
    number = torch.tensor([BACKGROUNDS.index(background)])
    return SceneBatch(identities, placements, count, number, torch.rand(1, 5, generator=generator))


def _hue(colour: Tensor) -> Tensor:
    """Hue in degrees of one RGB colour (3,)."""
    red, green, blue = colour
    high, low = colour.max(), colour.min()
    spread = (high - low).clamp(min=1e-6)
    if high == red:
        return 60 * ((green - blue) / spread % 6)
    if high == green:
        return 60 * ((blue - red) / spread + 2)
    return 60 * ((red - green) / spread + 4)


def render_scene(spec: SceneSpec) -> Scene:
    """Draw the scene that ``spec`` describes, with its truth."""
    return _scene(scene_batch(spec))


def redraw_scene(
    spec: SceneSpec,
    slots: Sequence[int],
    boxes: Sequence[Sequence[float]],
    background: str,
    seed: int = 0,
    colours: Sequence[int] | None = None,
) -> Scene:
    """The same things as in ``spec`` in a new picture, as a perfect model would draw them for a layout.

    In painter's order, the thing ``slots[i]`` of the scene fills ``boxes[i]`` ([x0, y0, x1, y1] in [0, 1]):
    as large as its extent allows, in its middle, in a new turn and mirror of ``seed``. ``colours`` names the
    things whose colours they wear instead of their own. Raises MifoError for an unknown background.
    """
    check_word("background", background, BACKGROUNDS)
    generator = torch.Generator().manual_seed(seed)
    known = scene_batch(spec).identities
    identities = known[:, list(slots)]
    if colours is not None:
        worn = {
            name: getattr(known, name)[:, list(colours)] for name in ("colour", "body", "second", "accent")
        }
        identities = dataclasses.replace(identities, **worn)
    turn = (torch.rand(1, len(slots), generator=generator) - 0.5) * 0.3
    mirror = torch.where(torch.rand(1, len(slots), generator=generator) < 0.5, -1.0, 1.0)
    trial = Placements(torch.full((1, len(slots), 2), 0.5), torch.full((1, len(slots)), 0.4), turn, mirror)
    fitted = dataclasses.replace(trial, centre=trial.centre.clone(), size=trial.size.clone())
    for place, box in enumerate(boxes):
        x0, y0, x1, y1 = mask_boxes(draw_things(identities[:, place], trial[:, place], SIZE)[1])[0]
        left, top, right, bottom = torch.tensor(box)
        scale = torch.minimum((right - left) / (x1 - x0), (bottom - top) / (y1 - y0))
        fitted.size[0, place] = 0.4 * scale
        middle = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2]) - 0.5
        fitted.centre[0, place] = torch.stack([(left + right) / 2, (top + bottom) / 2]) - middle * scale
    return _scene(_one_scene(identities, fitted, background, generator))


def _scene(batch: SceneBatch) -> Scene:
    images, masks = draw(batch)
    return Scene(images[0], masks[0] > 0.5, mask_boxes(masks[0]))
