"""Masked attention: its masks against the rules word by word, what it reads against other recordings."""

import pytest
import torch
from mifo.backbones.unet.layers import choose_layers
from mifo.backbones.unet.masking import MaskedAttention, cross_attention_bits, self_attention_bits
from mifo.backbones.unet.recording import AttentionRecorder
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from mifo.acceleration.bounded_attention import sees
from mifo.method.regions.boxes import rasterise_boxes

BOXES = [(0.0, 0.0, 0.75, 0.75), (0.375, 0.25, 1.0, 0.625)]  # they overlap
SUBJECT_TOKENS, FILTER, EOS = [[4], [6, 7]], [1, 3, 5], 9


@pytest.fixture
def shapes():
    """Two samples with different overlapping shapes of two subjects, 4×4."""
    boxes = rasterise_boxes(BOXES, 4)
    return torch.stack([boxes, boxes.flip(-1)]).flatten(2)


@pytest.fixture
def text_states():
    return torch.randn(4, 77, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def latents():
    return torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(6))


def masked(unet, text_states, **options):
    chosen = choose_layers(unet)
    attention = MaskedAttention(
        unet, text_states, SUBJECT_TOKENS, FILTER, EOS, chosen.guidance, chosen.shapes, **options
    )
    attention.bound(lambda side: rasterise_boxes(BOXES, side)[None])
    return attention


@pytest.mark.parametrize("guidance", [False, True])
def test_cross_attention_follows_the_rules(shapes, guidance):
    subject_tokens = torch.zeros(2, 12, dtype=torch.bool)
    for row, positions in zip(subject_tokens, SUBJECT_TOKENS, strict=True):
        row[positions] = True
    filter_tokens = torch.zeros(12, dtype=torch.bool)
    filter_tokens[FILTER] = True
    pixels, tokens = cross_attention_bits(shapes, subject_tokens, filter_tokens, EOS, guidance)
    assert pixels.dtype == tokens.dtype == torch.int32
    mask = sees(pixels, tokens)
    for sample in range(2):
        for pixel in range(16):
            inside = [shapes[sample, subject, pixel].item() for subject in range(2)]
            background = not any(inside)
            for token in range(12):
                is_open = token not in FILTER
                for subject in range(2):
                    if token in SUBJECT_TOKENS[subject]:
                        is_open = inside[subject] or (guidance and background)
                if token == EOS and background and not guidance:
                    is_open = False
                assert mask[sample, pixel, token] == is_open


def test_self_attention_follows_the_rules(shapes):
    queries, keys = self_attention_bits(shapes)
    assert queries.dtype == keys.dtype == torch.int32
    mask = sees(queries, keys)
    for sample in range(2):
        owners = [{s for s in range(2) if shapes[sample, s, pixel]} for pixel in range(16)]
        for query in range(16):
            for key in range(16):
                is_open = not owners[query] or not owners[key] or bool(owners[query] & owners[key])
                assert mask[sample, query, key] == is_open
    assert any(len(at) == 2 for at in owners)


def test_closed_tokens_do_not_reach_the_picture_and_open_ones_do(vector_unet, text_states, latents):
    def change(token, row):
        changed = text_states.clone()
        changed[row, token] += 1
        return changed

    def predict(states):
        with torch.no_grad(), masked(vector_unet, states) as attention:
            return attention.denoising_pass(latents, torch.tensor(500))

    before = predict(text_states)
    assert torch.equal(predict(change(FILTER[0], 3)), before)
    assert not torch.allclose(predict(change(4, 3))[3], before[3])
    assert not torch.allclose(predict(change(FILTER[0], 1))[1], before[1])  # the unconditional half is open


def test_reading_does_not_change_the_prediction(vector_unet, text_states, latents):
    with torch.no_grad(), masked(vector_unet, text_states) as attention:
        fused = attention.denoising_pass(latents, torch.tensor(500))
        read = attention.denoising_pass(latents, torch.tensor(500), record=True)
    torch.testing.assert_close(read, fused, rtol=1e-4, atol=1e-5)


def test_recorded_maps_are_means_of_the_conditional_half_over_passes_and_layers(
    vector_unet, text_states, latents
):
    shape_layers = choose_layers(vector_unet).shapes
    expected = {"self": [], "cross": []}
    with torch.no_grad(), AttentionRecorder(vector_unet, shape_layers) as recorder:
        for time in (900, 400):
            vector_unet(torch.cat([latents, latents]), time, encoder_hidden_states=text_states)
            for layer in shape_layers:
                maps = recorder.probabilities[layer][2:]
                kind = "cross" if maps.shape[-1] == 77 else "self"
                expected[kind].append(maps[..., [4, 7]] if kind == "cross" else maps)
    with torch.no_grad(), masked(vector_unet, text_states, masked=False) as attention:
        attention.denoising_pass(latents, torch.tensor(900), record=True)
        attention.guidance_pass(latents, torch.tensor(700))  # leaves no trace
        attention.denoising_pass(latents, torch.tensor(600))  # nor does this
        attention.denoising_pass(latents, torch.tensor(400), record=True)
    torch.testing.assert_close(attention.self_map, torch.stack(expected["self"]).mean(0))
    torch.testing.assert_close(attention.cross_map, torch.stack(expected["cross"]).mean(0))


def test_guidance_runs_the_conditional_half_and_stops_after_the_last_layer_it_reads(
    vector_unet, text_states, latents
):
    ran = []
    for name, module in vector_unet.named_modules():
        if name in ("conv_in", "up_blocks.1.resnets.2", "up_blocks.2", "conv_out"):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: ran.append((name, len(inputs[0])))
            )
    with masked(vector_unet, text_states) as attention:
        cross_sums, self_sums = attention.guidance_pass(latents, torch.tensor(700))
    assert ran == [("conv_in", 2), ("up_blocks.1.resnets.2", 2)]
    assert [sums.shape for sums in cross_sums + self_sums] == [(2, 2, 2)] * 8


def test_each_sample_is_masked_by_its_own_shapes(vector_unet, text_states, latents):
    def shapes_at(side):
        grid = rasterise_boxes(BOXES, side)
        return torch.stack([grid, grid.flip(-1)])

    def predict(rows, select):
        with torch.no_grad(), masked(vector_unet, text_states[rows]) as attention:
            attention.bound(lambda side: shapes_at(side)[select])
            return attention.denoising_pass(latents[select], torch.tensor(300), record=True)

    both = predict([0, 1, 2, 3], [0, 1])
    for sample in (0, 1):
        alone = predict([sample, sample + 2], [sample])
        torch.testing.assert_close(both[[sample, sample + 2]], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_no_nan(vector_unet, text_states, latents, dtype):
    unet = vector_unet.to(dtype)
    latents.requires_grad_()
    with masked(unet, text_states.to(dtype)) as attention:
        cross_sums, self_sums = attention.guidance_pass(latents, torch.tensor(700))
        (gradient,) = torch.autograd.grad(sum(sums.sum() for sums in cross_sums + self_sums), latents)
        with torch.no_grad():
            prediction = attention.denoising_pass(latents, torch.tensor(700), record=True)
    assert prediction.dtype == gradient.dtype == torch.float32
    assert prediction.isfinite().all() and gradient.isfinite().all()
    assert gradient.abs().max() > 0
    assert attention.self_map.dtype == torch.float32


def test_attention_is_restored_whatever_happens(vector_unet, text_states, latents):
    before = dict(vector_unet.attn_processors)
    with pytest.raises(ZeroDivisionError), masked(vector_unet, text_states) as attention:
        attention.guidance_pass(latents, torch.tensor(700))
        assert vector_unet.attn_processors != before
        raise ZeroDivisionError
    assert vector_unet.attn_processors == before


@pytest.mark.parametrize("left_first", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
def test_long_queries_ask_cudnn_first_whatever_ran_before(
    vector_unet, text_states, latents, monkeypatch, left_first
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
    with sdpa_kernel([left_first, SDPBackend.MATH], set_priority=True), torch.no_grad():
        with masked(vector_unet, text_states) as attention:
            attention.denoising_pass(latents, torch.tensor(500))
        assert first() == int(left_first)
    assert asked == {(side**2, side >= 32, side >= 32) for side in (32, 16, 8, 4)}
