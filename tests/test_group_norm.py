"""GroupNorm of channels-last activations: its kernels, in an interpreter and on a GPU, and U-Nets with it."""

import gc
import weakref

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from interpreted import run_in_interpreter
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from mifo.acceleration import group_norm
from mifo.acceleration.channels_last import keep_channels_last
from mifo.acceleration.graphs import capture
from mifo.acceleration.group_norm import group_norm_silu

NHWC = torch.channels_last
NCHW = torch.contiguous_format
# the interpreter cuts where a GPU rounds
TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
KINDS = {
    "sd1": {},
    "sd2": {"use_linear_projection": True},
    "divided": {"resnet_out_scale_factor": 1.5, "mid_block_scale_factor": 2.0},
    "activated once": {"resnet_skip_time_act": True},
    "scaled": {"resnet_time_scale_shift": "scale_shift"},
    "resampling": {
        "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
    },
}


def agrees(shape, groups, dtype=torch.float32, silu=True, layouts=(NHWC, NHWC), device="cpu", mean=0.5):
    """Compare result and gradients with PyTorch's own in 64 bits."""
    torch.manual_seed(0)
    drawn = torch.randn(shape), torch.randn(shape[1]) + 1, torch.randn(shape[1]), torch.randn(shape)
    x, weight, bias, dy = (each.to(device, dtype) for each in drawn)
    x = (x + mean).contiguous(memory_format=layouts[0]).requires_grad_()
    dy = dy.contiguous(memory_format=layouts[1])
    learnt = (x, weight.requires_grad_(), bias.requires_grad_())
    y = group_norm_silu(*learnt, groups, 1e-5, silu)
    assert y.dtype == dtype and y.is_contiguous(memory_format=NHWC)
    found = (y, *torch.autograd.grad(y, learnt, dy))
    exact = [each.detach().double().requires_grad_() for each in learnt]
    y = F.group_norm(exact[0], groups, *exact[1:], eps=1e-5)
    y = F.silu(y) if silu else y
    for ours, theirs in zip(found, (y, *torch.autograd.grad(y, exact, dy.double())), strict=True):
        assert ours.dtype == dtype
        limit = TOLERANCES[dtype]
        near_zero = limit * theirs.abs().max().item() / 4
        torch.testing.assert_close(ours.double(), theirs, rtol=limit, atol=near_zero)


def check_in_interpreter():
    """The kernels on the processor, whatever a GPU would take."""
    group_norm._has_kernels = lambda x: True
    check_shapes()
    check_wanted_gradients()
    check_unet()


def check_shapes():
    from mifo.acceleration import group_norm_kernels as kernels

    agrees((1, 320, 8, 8), 32)
    agrees((2, 60, 5, 7), 6, torch.bfloat16, layouts=(NCHW, NHWC))
    agrees((2, 64, 4, 4), 32, torch.float16, layouts=(NHWC, NCHW))
    agrees((1, 60, 6, 6), 6, silu=False, layouts=(NCHW, NCHW))
    agrees((1, 160, 3, 9), 1, mean=100)
    kernels.FOLD = kernels.tl.constexpr(2)  # more tiles than are added up at once
    agrees((2, 60, 9, 9), 6, mean=100)
    kernels.ENOUGH = 1  # and larger ones
    agrees((2, 60, 9, 17), 6)
    agrees((2, 160, 10, 10), 2, torch.bfloat16, silu=False)
    kernels.MANY = 1  # tiles whose statistics are added up apart
    agrees((2, 60, 9, 17), 6, mean=100)
    agrees((1, 160, 16, 16), 2, torch.bfloat16)


def check_wanted_gradients():
    torch.manual_seed(0)
    drawn = torch.randn(1, 8, 4, 4), torch.randn(8), torch.randn(8)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        ours, theirs = (
            [each.clone().requires_grad_(needed) for each, needed in zip(drawn, wanted, strict=True)]
            for _ in range(2)
        )
        group_norm_silu(*ours, 2, 1e-5, True).square().sum().backward()
        F.silu(F.group_norm(theirs[0], 2, *theirs[1:])).square().sum().backward()
        for a, b, needed in zip(ours, theirs, wanted, strict=True):
            assert (a.grad is not None) == needed
            if needed:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def check_unet():
    unet = small_unet(use_linear_projection=True)
    plain = outcome(unet)
    keep_channels_last(unet)
    same(outcome(unet), plain, 1e-4)


def small_unet(**options):
    """A random U-Net in training mode; its convolutions are channels-last."""
    torch.manual_seed(0)
    layout = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (12, 24),
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "norm_num_groups": 6,
        "cross_attention_dim": 16,
        "sample_size": 8,
    }
    return UNet2DConditionModel(**layout | options).to(memory_format=NHWC).train()


def outcome(unet, weights=None):
    """Output of a U-Net, and gradients of its input and of all weights by name."""
    torch.manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    text = torch.randn(1, 3, 16)
    weights = weights or dict(unet.named_parameters())
    output = functional_call(unet, weights, (latents, 10, text)).sample
    gradients = torch.autograd.grad(output.square().sum(), (latents, *weights.values()))
    return {"output": output, **dict(zip(("latents", *weights), gradients, strict=True))}


def same(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        limit = tolerance * max(value.abs().max().item(), 1)
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=limit, msg=name)


def test_kernels_in_the_interpreter():
    run_in_interpreter("import test_group_norm; test_group_norm.check_in_interpreter()")


@pytest.mark.parametrize("silu", [True, False])
def test_elsewhere_it_is_that_of_pytorch(silu):
    x, weight, bias = torch.randn(2, 12, 5), torch.randn(12), torch.randn(12)
    y = F.group_norm(x, 3, weight, bias, 1e-3)
    assert torch.equal(group_norm_silu(x, weight, bias, 3, 1e-3, silu), F.silu(y) if silu else y)


def test_groups_are_equally_large():
    with pytest.raises(ValueError, match="10 channels"):
        group_norm_silu(torch.ones(1, 10, 2, 2), torch.ones(10), torch.ones(10), 3, 1e-5, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_u_net_kept_channels_last_computes_the_same(kind):
    unet = small_unet(**KINDS[kind])
    names = list(unet.state_dict())
    others = {name: weight * 1.5 for name, weight in unet.named_parameters()}
    plain, swapped = outcome(unet), outcome(unet, others)
    for _ in range(2):
        keep_channels_last(unet)
        assert list(unet.state_dict()) == names
        same(outcome(unet), plain, 1e-5)
    same(outcome(unet, others), swapped, 1e-5)


def small_vae():
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(block_out_channels=(12, 24), norm_num_groups=6, **blocks).to(memory_format=NHWC)


def test_an_autoencoder_kept_channels_last_computes_the_same():
    vae, images = small_vae(), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        decoded = vae.decode(latents).sample
        for part in (vae.encoder, vae.decoder):
            keep_channels_last(part)
            assert isinstance(part.conv_act, nn.Identity)
            assert not [each for each in part.modules() if type(each) is ResnetBlock2D]
        torch.testing.assert_close(vae.encode(images).latent_dist.mean, latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vae.decode(latents).sample, decoded, rtol=1e-5, atol=1e-5)


def test_only_ordinary_blocks_are_replaced():
    ordinary, scaled = small_unet(), small_unet(**KINDS["scaled"])
    for unet in (ordinary, scaled):
        keep_channels_last(unet)
    assert not [each for each in ordinary.modules() if type(each) in (ResnetBlock2D, Transformer2DModel)]
    assert {type(each) for each in scaled.modules() if isinstance(each, ResnetBlock2D)} == {ResnetBlock2D}


def test_weights_are_saved_and_loaded_as_before(tmp_path):
    unet, plain = small_unet(), small_unet(**KINDS["sd1"])
    keep_channels_last(unet)
    unet.save_pretrained(tmp_path)
    same(outcome(UNet2DConditionModel.from_pretrained(tmp_path).train()), outcome(plain), 1e-5)
    unet.load_state_dict({name: weight / 2 for name, weight in plain.state_dict().items()})
    plain.load_state_dict(unet.state_dict())
    same(outcome(unet), outcome(plain), 1e-5)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_blocks_give_channels_last(kind):
    unet = small_unet(**KINDS[kind])
    keep_channels_last(unet)
    seen = []
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D | Transformer2DModel | nn.GroupNorm):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    outcome(unet)
    outputs = [each if torch.is_tensor(each) else each[0] for each in seen]
    assert outputs and all(each.is_contiguous(memory_format=NHWC) for each in outputs)


def test_a_u_net_kept_channels_last_is_freed():
    unet = small_unet()
    keep_channels_last(unet)
    outcome(unet)
    gone = weakref.ref(unet), weakref.ref(unet.down_blocks[0].resnets[0])
    del unet
    gc.collect()
    assert [each() for each in gone] == [None, None]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_on_a_gpu(dtype):
    assert group_norm._has_kernels(torch.ones(1, 32, 4, 4, device="cuda", dtype=dtype))
    for shape, groups in (
        ((1, 320, 64, 64), 32),
        ((8, 960, 32, 32), 32),
        ((2, 2560, 8, 8), 32),
        ((1, 320, 128, 128), 32),
        ((2, 64, 4, 4), 32),
        ((1, 60, 5, 7), 6),
        ((2, 128, 512, 512), 32),
    ):
        agrees(shape, groups, dtype, device="cuda")
        agrees(shape, groups, dtype, silu=False, layouts=(NCHW, NCHW), device="cuda")
    if dtype == torch.float32:
        agrees((1, 320, 64, 64), 32, dtype, device="cuda", mean=100)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_in_a_graph(dtype):
    torch.manual_seed(0)
    x, dy = torch.randn(2, 1, 320, 32, 32, device="cuda", dtype=dtype)
    weight, bias = torch.randn(2, 320, device="cuda", dtype=dtype)

    def passes(x, dy):
        learnt = [each.detach().requires_grad_() for each in (x, weight, bias)]
        y = group_norm_silu(*learnt, 32, 1e-5, True)
        return y.detach(), *torch.autograd.grad(y, learnt, dy)

    replayed = capture(passes, (x, dy))
    for factor in (1, 2):
        for ours, theirs in zip(replayed(x * factor, dy), passes(x * factor, dy), strict=True):
            assert torch.equal(ours, theirs)
