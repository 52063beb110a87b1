"""Attention of a U-Net, read and bounded, against diffusers' own; the U-Net is left as it was found."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from terms import one_term
from test_objective import PROCESS
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from vector_model import VectorModel, prompt

from mifo.backbones.attention import bias_of
from mifo.method.backbone import Rule
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.losses.timeline import Timeline
from mifo.method.objective import word_maps
from mifo.method.prompts.instances import PromptTokens
from mifo.method.regions.grids import rasterise_boxes
from mifo.method.synthesis import sampler as sampler_module
from mifo.method.synthesis.sampler import Regions, Sampler
from mifo.method.synthesis.settings import SynthesisSettings

BOXES = {"a": (0.0, 0.0, 0.75, 0.75), "b": (0.375, 0.25, 1.0, 0.625)}  # they overlap
TOKENS = PromptTokens({"a": (4,), "b": (6, 7)}, (1, 3, 5), 9, 77)


def whole(probabilities):
    """Keeps the mean over heads."""
    return probabilities.mean(1)


@pytest.fixture
def model(vector_unet):
    return VectorModel(vector_unet, PROCESS)


@pytest.fixture
def inputs():
    """Latents, a time and states of two samples."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 32, 32, generator=generator)
    return latents, torch.tensor(321), torch.randn(2, 77, 32, generator=generator)


@pytest.fixture
def text_states():
    """Two samples' unconditional and conditional rows."""
    return torch.randn(4, 77, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def latents():
    return torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(6))


def predicted(model, inputs, reads=None):
    latents, time, states = inputs
    return model.predict(latents, time, prompt(states), reads)


class ScoresKept(AttnProcessor):
    """Diffusers' explicit attention, with the probabilities of each call kept."""

    def __init__(self):
        self.kept = []

    def __call__(self, attn, *args, **kwargs):
        scores = attn.get_attention_scores
        attn.get_attention_scores = lambda *a: self.kept.append(scores(*a)) or self.kept[-1]
        try:
            return super().__call__(attn, *args, **kwargs)
        finally:
            del attn.get_attention_scores


def test_output_and_probabilities_equal_those_of_diffusers(model, vector_unet, inputs):
    vector_unet.set_attn_processor(reference := ScoresKept())
    expected = vector_unet(*inputs).sample
    output, maps = predicted(model, inputs, dict.fromkeys(model.sites, whole))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert list(maps) == list(model.sites)
    for (site, found), scores in zip(maps.items(), reference.kept, strict=True):
        torch.testing.assert_close(found, scores.unflatten(0, (2, -1)).mean(1), rtol=1e-3, atol=1e-5)
        assert found.shape[1] == site.size[0] * site.size[1]
        assert found.shape[2] == (77 if site.kind == "words" else found.shape[1])


def test_unread_attention_is_that_of_diffusers(model, vector_unet, inputs):
    torch.testing.assert_close(predicted(model, inputs)[0], vector_unet(*inputs).sample, rtol=1e-4, atol=1e-5)


def test_word_maps_come_from_the_last_rows(model, inputs):
    sites = model.default_sites.semantic
    _, all_words = predicted(model, inputs, dict.fromkeys(sites, whole))
    _, chosen = predicted(model, inputs, dict.fromkeys(sites, word_maps(torch.tensor([[6, 3, 6]]))))
    for site in sites:
        torch.testing.assert_close(chosen[site], all_words[site][1:, :, [6, 3, 6]])


def test_only_the_chosen_sites_are_kept_and_the_rest_still_attends(model, vector_unet, inputs):
    site = model.sites[13]
    output, maps = predicted(model, inputs, {site: whole})
    torch.testing.assert_close(output, vector_unet(*inputs).sample, rtol=1e-4, atol=1e-5)
    assert list(maps) == [site]


def test_maps_end_after_the_last_site_that_is_read(model, vector_unet, inputs):
    latents, time, states = inputs
    reads = dict.fromkeys([model.sites[15], model.sites[13]], whole)
    ran = []
    vector_unet.up_blocks[2].register_forward_pre_hook(lambda *_: ran.append("later"))
    maps = model.maps(latents, time, prompt(states), reads)
    assert not ran and list(maps) == [model.sites[13], model.sites[15]]
    _, expected = predicted(model, inputs, reads)
    assert ran and all(torch.equal(maps[site], expected[site]) for site in expected)


def test_a_mask_of_the_prompt_is_obeyed(model, vector_unet, inputs):
    mask = torch.ones(2, 77)
    mask[:, 10:] = 0
    expected = vector_unet(*inputs, encoder_attention_mask=mask).sample
    plain, site = vector_unet.forward, model.sites[13]
    vector_unet.forward = lambda *args, **options: plain(*args, **options, encoder_attention_mask=mask)
    for reads in ({site: whole}, {}):
        output, maps = predicted(model, inputs, reads)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert not reads or maps[site][..., 10:].abs().max() == 0


def test_maps_stay_in_32_bits_under_autocast_and_pass_gradients(model, inputs):
    site = model.sites[15]
    inputs[2].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        _, maps = predicted(model, inputs, {site: whole})
    assert maps[site].dtype == torch.float32
    torch.testing.assert_close(maps[site].sum(-1), torch.ones(2, 64), rtol=0, atol=1e-5)
    maps[site][..., 4].sum().backward()
    assert inputs[2].grad.abs().sum() > 0


def test_checkpointing_changes_no_gradient_though_reads_are_gone_when_backward_runs(
    model, vector_unet, inputs
):
    latents, time, text = inputs
    (term,) = Timeline(one_term("penalty"), "semantic", 10, model).active(0)
    read = word_maps(torch.tensor([[4], [5]]))
    runs = []
    block = vector_unet.up_blocks[1].attentions[0].transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    gradients, counts = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_checkpointing()
        vector_unet.train()
        runs.clear()
        leaf = text.clone().requires_grad_()
        before = dict(vector_unet.attn_processors)
        output, maps = model.predict(latents, time, prompt(leaf), dict.fromkeys(term.sites, read))
        assert vector_unet.attn_processors == before
        (output.mean() + sum(each.square().sum() for each in maps.values())).backward()
        assert vector_unet.attn_processors == before
        gradients.append(leaf.grad)
        counts.append(len(runs))
    assert counts == [1, 2]
    torch.testing.assert_close(*gradients)


def test_low_rank_adapters_take_part(model, vector_unet, inputs):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    vector_unet.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=0.2, target_modules=targets, init_lora_weights=False)
    )
    expected, site = vector_unet(*inputs).sample, model.sites[15]
    output, adapted = predicted(model, inputs, {model.sites[13]: whole, site: whole})
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    vector_unet.disable_adapters()
    _, plain = predicted(model, inputs, {site: whole})
    assert (adapted[site] - plain[site]).abs().max() > 1e-4


def test_the_old_processors_return_whatever_happens(model, vector_unet, inputs):
    vector_unet.set_attn_processor({name: AttnProcessor() for name in vector_unet.attn_processors})
    before = dict(vector_unet.attn_processors)
    during = []

    def stop(probabilities):
        during.append(dict(vector_unet.attn_processors))
        raise ZeroDivisionError

    for call in (model.predict, model.maps):
        with pytest.raises(ZeroDivisionError):
            call(inputs[0], inputs[1], prompt(inputs[2]), {model.sites[13]: stop})
        assert all(vector_unet.attn_processors[name] is processor for name, processor in before.items())
    for processors in during:
        assert not any(processor in before.values() for processor in processors.values())
    model.maps(inputs[0], inputs[1], prompt(inputs[2]), {model.sites[13]: whole})  # ends midway
    assert all(vector_unet.attn_processors[name] is processor for name, processor in before.items())


def test_a_bias_closes_what_has_no_bit_in_common():
    rule = Rule(
        torch.tensor([[1, 2, 3]], dtype=torch.int32), torch.tensor([[1, 2, 4, -1]], dtype=torch.int32)
    )
    expected = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 1]]).bool()
    assert torch.equal(rule.allowed()[0], expected)
    assert torch.equal(bias_of(rule, torch.float16)[0, 0] == 0, expected)
    assert bias_of(rule, torch.float16)[0, 0][~expected].isneginf().all()


def regions_of(model, samples=2, **changes):
    """A sampler of a hundred steps, whose step 10·i is at time 990 − 100·i, and its regions."""
    sampler = Sampler(model, SynthesisSettings(steps=100), GuidanceSettings(**changes))
    return sampler, Regions(sampler, BOXES, TOKENS, samples, torch.device("cpu"))


def both_halves(sampler, regions, latents, states, time=500, record=False):
    """Prediction (2B, C, h, w) and maps of a denoising pass."""
    leading = regions.words.leading if record else None
    with torch.no_grad():
        rules = regions.rules(guidance=False)
        return sampler.prediction(latents, torch.tensor(time), prompt(states), rules, leading)


def test_closed_tokens_do_not_reach_the_picture_and_open_ones_do(model, text_states, latents):
    def change(token, row):
        changed = text_states.clone()
        changed[row, token] += 1
        return changed

    def predict(states):
        return both_halves(*regions_of(model), latents, states)[0]

    before = predict(text_states)
    function_word = TOKENS.filter_indices[0]
    assert torch.equal(predict(change(function_word, 3)), before)
    assert not torch.allclose(predict(change(4, 3))[3], before[3])
    assert not torch.allclose(predict(change(function_word, 1))[1], before[1])  # unconditional half: open


def test_reading_does_not_change_the_prediction(model, text_states, latents):
    fused, nothing = both_halves(*regions_of(model), latents, text_states)
    read, maps = both_halves(*regions_of(model), latents, text_states, record=True)
    torch.testing.assert_close(read, fused, rtol=1e-4, atol=1e-5)
    assert not nothing and {kind: each.shape for kind, each in maps.items()} == {
        "pixels": (2, 64, 64),
        "words": (2, 64, 2),
    }


def test_recorded_maps_are_means_of_the_conditional_half_over_passes_and_layers(model, text_states, latents):
    shaping = model.default_sites.shapes
    expected = {"pixels": [], "words": []}
    with torch.no_grad():
        for time in (900, 400):
            both = torch.cat([latents, latents])
            _, found = predicted(
                model, (both, torch.tensor(time), text_states), dict.fromkeys(shaping, whole)
            )
            for site, maps in found.items():
                expected[site.kind].append(maps[2:][..., [4, 7]] if site.kind == "words" else maps[2:])
    sampler, regions = regions_of(model, masked=False)
    assert regions.rules(guidance=False) is None
    regions.add(both_halves(sampler, regions, latents, text_states, 900, record=True)[1])
    regions.guide(latents, prompt(text_states), 2)  # leaves no trace
    regions.add(both_halves(sampler, regions, latents, text_states, 600)[1])  # nor does this
    regions.add(both_halves(sampler, regions, latents, text_states, 400, record=True)[1])
    assert regions.passes == 2
    for kind, maps in expected.items():
        torch.testing.assert_close(regions.totals[kind] / regions.passes, torch.stack(maps).mean(0))


def test_guidance_runs_the_conditional_half_and_stops_after_the_last_layer_it_reads(
    model, vector_unet, text_states, latents
):
    ran = []
    for name, module in vector_unet.named_modules():
        if name in ("conv_in", "up_blocks.1.resnets.2", "up_blocks.2", "conv_out"):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: ran.append((name, len(inputs[0])))
            )
    _, regions = regions_of(model, iterations=1)
    guided, losses = regions.guide(latents, prompt(text_states), 0)
    assert ran == [("conv_in", 2), ("up_blocks.1.resnets.2", 2)]
    assert losses.shape == (1,) and not torch.allclose(guided, latents)


def test_each_sample_is_masked_by_its_own_shapes(model, text_states, latents, monkeypatch):
    side = model.default_sites.shapes[0].size[0]
    grid = rasterise_boxes(list(BOXES.values()), side)
    shapes = torch.stack([grid, grid.flip(-1)])

    def predict(rows, select):
        sampler, regions = regions_of(model, len(select))
        monkeypatch.setattr(sampler_module, "renew_shapes", lambda *_: (shapes[select], None))
        regions.totals, regions.passes = {"pixels": torch.zeros(()), "words": torch.zeros(())}, 1
        regions.renew(GuidanceSettings().shapes_from)
        return both_halves(sampler, regions, latents[select], text_states[rows], 300, record=True)[0]

    both = predict([0, 1, 2, 3], [0, 1])
    for sample in (0, 1):
        alone = predict([sample, sample + 2], [sample])
        torch.testing.assert_close(both[[sample, sample + 2]], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_no_nan(vector_unet, text_states, latents, dtype):
    states = text_states.to(dtype)
    sampler, regions = regions_of(
        VectorModel(vector_unet.to(dtype), PROCESS), iterations=1, step_size_start=1.0
    )
    guided, losses = regions.guide(latents, prompt(states), 0)
    gradient = latents - guided
    prediction, maps = both_halves(sampler, regions, latents, states, 700, record=True)
    assert prediction.dtype == gradient.dtype == maps["pixels"].dtype == losses.dtype == torch.float32
    assert prediction.isfinite().all() and gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("left_first", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
def test_long_queries_ask_cudnn_first_whatever_ran_before(
    model, text_states, latents, monkeypatch, left_first
):
    fused = functional.scaled_dot_product_attention
    asked = set()

    def first():
        return torch._C._get_sdp_priority_order()[0]

    def noting(query, *args, **options):
        cudnn = int(SDPBackend.CUDNN_ATTENTION)
        asked.add((query.shape[2], torch.backends.cuda.cudnn_sdp_enabled(), first() == cudnn))
        return fused(query, *args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noting)
    with sdpa_kernel([left_first, SDPBackend.MATH], set_priority=True):
        both_halves(*regions_of(model), latents, text_states)
        assert first() == int(left_first)
    assert asked == {(side**2, side >= 32, side >= 32) for side in (32, 16, 8, 4)}
