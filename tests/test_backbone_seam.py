"""The method on a model of a few lines, neither a U-Net nor diffusers': the protocol is all it needs."""

import math

import pytest
import torch
from terms import one_term
from torch import Tensor

from mifo.method.backbone import Backbone, Conditioning, DefaultSites, Site
from mifo.method.diffusion.ddim import DDIM
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.losses.settings import PenaltySettings, Ramp, TermSettings
from mifo.method.losses.timeline import Timeline
from mifo.method.objective import StepInputs, learning_loss
from mifo.method.prompts.instances import PromptTokens
from mifo.method.synthesis.sampler import Sampler
from mifo.method.synthesis.settings import SynthesisSettings

CHANNELS, SIDE, LENGTH, WIDTH, VOCABULARY = 3, 8, 6, 5, 16
TOKENS = PromptTokens({"a": (1,), "b": (3,)}, (2,), 4, LENGTH)
HALVES = {"a": (0.0, 0.0, 0.5, 1.0), "b": (0.5, 0.0, 1.0, 1.0)}
BOXES = {"a": (0.0, 0.0, 0.5, 0.75), "b": (0.5, 0.25, 1.0, 1.0)}


class Toy(torch.nn.Module):
    """One linear layer whose pixels attend to words and then to each other, in one softmax each.

    Its conditioning has two parts, of which the second says how much the words count.
    """

    latent_shape = (CHANNELS, SIDE, SIDE)
    process = DDIM(torch.linspace(0.999, 0.01, 1000))
    sites = (Site(0, "joint", "words", (SIDE, SIDE)), Site(1, "joint", "pixels", (SIDE, SIDE)))
    default_sites = DefaultSites(sites[:1], sites[:1], sites, sites)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.query = torch.nn.Linear(CHANNELS, WIDTH)
        self.out = torch.nn.Linear(WIDTH, CHANNELS)

    def tokenize(self, prompts):
        return torch.tensor([[hash_of(word) for word in words.split()] for words in prompts])

    def encode(self, ids):
        return Conditioning({"words": self.table(ids), "strength": torch.ones(len(ids), 1, 1)})

    def encode_images(self, images, at_once=8):
        mean = torch.stack(list(images))
        return mean, torch.zeros_like(mean)

    def decode_latents(self, latents, at_once=4):
        return latents.clamp(0, 1)

    def predict(self, noisy, time, conditioning, reads=None, rules=None):
        kept: dict[Site, Tensor] = {}
        words, strength = conditioning.parts["words"], conditioning.parts["strength"]
        pixels = self.query(noisy.flatten(2).mT) + torch.as_tensor(time).view(-1, 1, 1) / 1000
        for site, keys in zip(self.sites, (words * strength, None), strict=True):
            keys = pixels if keys is None else keys
            scores = pixels @ keys.mT / math.sqrt(WIDTH)
            if rules is not None:
                scores = scores.masked_fill(~rules.of(site).allowed(), -math.inf)
            attention = scores.softmax(-1)
            if reads and site in reads:
                kept[site] = reads[site](attention[:, None])  # one head
            pixels = pixels + attention @ keys
        return self.out(pixels).mT.unflatten(2, (SIDE, SIDE)), kept

    def maps(self, noisy, time, conditioning, reads, rules=None):
        return self.predict(noisy, time, conditioning, reads, rules)[1]


def hash_of(word: str) -> int:
    return sum(map(ord, word)) % VOCABULARY


@pytest.fixture
def toy() -> Backbone:
    return Toy()


@pytest.fixture
def inputs():
    """A class sample and two instance samples of two instances."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.zeros(2, 2, SIDE, SIDE)
    masks[:, 0, :, : SIDE // 2], masks[:, 1, :, SIDE // 2 :] = 1, 1
    latents, noise = torch.randn(2, 3, CHANNELS, SIDE, SIDE, generator=generator)
    times = torch.tensor([900, 100, 300])
    positions = torch.tensor([[1, 3], [3, 1]])
    return StepInputs(latents, noise, times, positions, {(SIDE, SIDE): masks}, masks, torch.ones(2, 2))


def loss_of(model, inputs, settings, step=0, stage="semantic"):
    timeline = Timeline(settings, stage, 20, model)
    terms = timeline.active(step)
    weights = torch.tensor([timeline.weight(term, step) for term in terms])
    conditioning = model.encode(model.tokenize(["s a f b e e"] * 3))
    return learning_loss(model, conditioning, inputs, terms, weights, prior_weight=0.5)


def test_the_objective_is_that_of_explicit_softmaxes(toy, inputs):
    loss = loss_of(toy, inputs, one_term("penalty", 0.7, time_below=0.5))
    noisy = toy.process.add_noise(inputs.latents, inputs.noise, inputs.times)
    words = toy.table(toy.tokenize(["s a f b e e"])[0])
    expected = []
    for sample in (1, 2):
        queries = toy.query(noisy[sample].flatten(1).T) + inputs.times[sample] / 1000
        attention = (queries @ words.T / math.sqrt(WIDTH)).softmax(-1)
        for place, mask in zip(
            inputs.word_positions[sample - 1], inputs.latent_masks[sample - 1], strict=True
        ):
            expected.append((attention[:, place] * (1 - mask.flatten())).square().mean())
    torch.testing.assert_close(loss.attention, 0.7 * torch.stack(expected).sum() / 2)
    (maps,) = loss.maps.values()
    assert maps.shape == (2, 2, SIDE, SIDE)
    torch.testing.assert_close(loss.total, loss.denoising + loss.prior + loss.attention)
    assert loss.prior > 0 and loss.denoising > 0


def test_terms_come_and_go_and_words_learn_where_they_belong(toy, inputs):
    """A reward whose weight falls, then a penalty; the halves of the picture differ in colour."""
    settings = PenaltySettings(
        {
            "reward": TermSettings("reward", 50.0, to_step=60, ramp=Ramp.linear, weight_end=10.0),
            "penalty": TermSettings("penalty", 20.0, from_step=40, sites=["joint"]),
        }
    )
    timeline = Timeline(settings, "semantic", 120, toy)
    assert [len(active) for _, _, active in timeline.spans()] == [1, 2, 1]
    masks = inputs.masks[SIDE, SIDE]
    coloured = inputs._replace(
        latents=inputs.latents * 0.1 + 2 * (masks[:1, :1] - masks[:1, 1:]),
        noise=inputs.noise * 0.1,
        word_positions=torch.tensor([[1, 3], [1, 3]]),
    )
    optimizer = torch.optim.Adam(toy.table.parameters(), 0.05)
    others = [toy.query.weight.clone(), toy.out.weight.clone()]
    outside = []
    for step in range(120):
        terms = timeline.active(step)
        weights = torch.tensor([timeline.weight(term, step) for term in terms])
        loss = learning_loss(
            toy, toy.encode(toy.tokenize(["s a f b e e"] * 3)), coloured, terms, weights, 1.0
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        (maps,) = loss.maps.values()
        outside.append(((maps * (1 - masks)).sum() / maps.sum()).item())
    assert outside[0] > 0.4 and outside[-1] < 0.1
    assert torch.equal(others[0], toy.query.weight) and torch.equal(others[1], toy.out.weight)


GUIDED = GuidanceSettings(
    guided_steps=3,
    iterations=3,
    threshold=0.0,
    step_size_start=0.5,
    step_size_end=0.5,
    shapes_from=3,
    shapes_every=2,
)


def sampled(model, guidance=GUIDED, boxes=None, scale=1.5, **options):
    sampler = Sampler(model, SynthesisSettings(steps=6, guidance_scale=scale), guidance)
    conditioning = model.encode(model.tokenize(["s u u u e e"] * 2 + ["s a f b e e"] * 2))
    noise = torch.randn(2, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    return sampler(conditioning, noise, boxes, TOKENS, **options)


def test_without_boxes_it_is_plain_sampling(toy):
    noise = torch.randn(2, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    times = toy.process.times(6)
    with torch.no_grad():
        without, within = (toy.encode(toy.tokenize([words] * 2)) for words in ("s u u u e e", "s a f b e e"))
        for step, time in enumerate(times):
            plain, prompted = (toy.predict(noise, torch.tensor(time), each)[0] for each in (without, within))
            noise = toy.process.step(noise, plain + 1.5 * (prompted - plain), times, step)
    torch.testing.assert_close(sampled(toy), noise, rtol=1e-4, atol=1e-5)


def test_boxes_guide_bound_and_renew(toy):
    reports = []
    latents = sampled(toy, boxes=BOXES, on_step=reports.append)
    assert latents.isfinite().all() and not torch.allclose(latents, sampled(toy))
    assert [len(report.losses) for report in reports] == [3, 3, 3, 0, 0, 0]
    for report in reports[:3]:
        assert (report.losses[1:] < report.losses[:-1]).all()
    shapes = [report.shapes for report in reports]
    left = torch.arange(SIDE) < SIDE // 2
    assert torch.equal(shapes[0][0, 0], left & (torch.arange(SIDE)[:, None] < 6))
    assert torch.equal(shapes[0], shapes[2]) and not (shapes[5][:, 0] & shapes[5][:, 1]).any()
    assert shapes[5].shape == (2, 2, SIDE, SIDE)


def test_a_bounded_word_reaches_its_own_box_only(toy):
    """Unguided and with fixed boxes: a change of word a moves pixels of box a, and none of box b."""
    masks_only = GuidanceSettings(guided_steps=0, shapes_every=0)
    before = sampled(toy, masks_only, HALVES)
    with torch.no_grad():
        toy.table.weight[hash_of("a")] += 1
    moved = (sampled(toy, masks_only, HALVES) - before).abs().amax((0, 1))
    assert moved[:, : SIDE // 2].min() > 1e-4
    assert moved[:, SIDE // 2 :].max() == 0
