"""Recorded attention against diffusers' own processors, and the U-Net left as it was found."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from mifo.backbones.unet.layers import attention_layers, choose_layers
from mifo.backbones.unet.recording import AttentionRecorder

from mifo.errors import MifoError


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 32, 32, generator=generator), 321, torch.randn(2, 77, 32, generator=generator)


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


def test_output_and_probabilities_equal_those_of_diffusers(vector_unet, inputs):
    layers = attention_layers(vector_unet)
    vector_unet.set_attn_processor(reference := ScoresKept())
    expected = vector_unet(*inputs).sample
    with AttentionRecorder(vector_unet, [layer.index for layer in layers]) as recorder:
        output = vector_unet(*inputs).sample
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for layer, scores in zip(layers, reference.kept, strict=True):
        torch.testing.assert_close(
            recorder.probabilities[layer.index], scores.unflatten(0, (2, -1)).mean(1), rtol=1e-3, atol=1e-5
        )


def test_token_columns_come_from_the_last_rows(vector_unet, inputs):
    layers = choose_layers(vector_unet).semantic
    with AttentionRecorder(vector_unet, layers) as recorder:
        vector_unet(*inputs)
        whole = dict(recorder.probabilities)
        recorder.token_positions = torch.tensor([[6, 3, 6]])
        vector_unet(*inputs)
    for layer in layers:
        torch.testing.assert_close(recorder.probabilities[layer], whole[layer][1:, :, [6, 3, 6]])


def test_only_the_chosen_layers_are_kept_and_the_rest_still_attends(vector_unet, inputs):
    expected = vector_unet(*inputs).sample
    with AttentionRecorder(vector_unet, [13]) as recorder:
        torch.testing.assert_close(vector_unet(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
    assert list(recorder.probabilities) == [13]


def test_a_mask_of_the_prompt_is_obeyed(vector_unet, inputs):
    mask = torch.ones(2, 77)
    mask[:, 10:] = 0
    expected = vector_unet(*inputs, encoder_attention_mask=mask).sample
    with AttentionRecorder(vector_unet, [13]) as recorder:
        output = vector_unet(*inputs, encoder_attention_mask=mask).sample
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert recorder.probabilities[13][..., 10:].abs().max() == 0


def test_maps_stay_in_32_bits_under_autocast_and_pass_gradients(vector_unet, inputs):
    latents, timestep, text = inputs
    text.requires_grad_()
    with AttentionRecorder(vector_unet, [15]) as recorder, torch.autocast("cpu", torch.bfloat16):
        vector_unet(latents, timestep, text)
    maps = recorder.probabilities[15]
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 64), rtol=0, atol=1e-5)
    maps[..., 4].sum().backward()
    assert text.grad.abs().sum() > 0


def test_gradient_checkpointing_changes_no_gradient(vector_unet, inputs):
    latents, timestep, text = inputs
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            vector_unet.enable_gradient_checkpointing()
        vector_unet.train()
        leaf = text.clone().requires_grad_()
        with AttentionRecorder(vector_unet, [15], torch.tensor([[4], [5]])) as recorder:
            output = vector_unet(latents, timestep, leaf).sample
            (output.mean() + recorder.probabilities[15].square().sum()).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_low_rank_adapters_take_part(vector_unet, inputs):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    vector_unet.add_adapter(
        peft.LoraConfig(
            r=2, lora_alpha=0.2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
        )
    )
    expected = vector_unet(*inputs).sample
    with AttentionRecorder(vector_unet, [13, 15]) as recorder:
        torch.testing.assert_close(vector_unet(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
        adapted = recorder.probabilities[15]
        vector_unet.disable_adapters()
        vector_unet(*inputs)
    assert (adapted - recorder.probabilities[15]).abs().max() > 1e-4


def test_the_old_processors_return_after_an_exception(vector_unet):
    vector_unet.set_attn_processor({name: AttnProcessor() for name in vector_unet.attn_processors})
    before = dict(vector_unet.attn_processors)
    with pytest.raises(RuntimeError, match="stop"), AttentionRecorder(vector_unet, [13]):
        assert not any(processor in before.values() for processor in vector_unet.attn_processors.values())
        raise RuntimeError("stop")
    assert all(vector_unet.attn_processors[name] is processor for name, processor in before.items())


def test_a_layer_that_does_not_exist_is_refused(vector_unet):
    with pytest.raises(MifoError, match="layers 0 to 31, so layer 32"):
        AttentionRecorder(vector_unet, [4, 32])
