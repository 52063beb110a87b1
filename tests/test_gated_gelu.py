"""The product of gated feed-forwards: its kernels, in an interpreter and on a GPU, and U-Nets with it."""

import pytest
import torch
from diffusers.models.activations import GEGLU
from interpreted import run_in_interpreter
from test_group_norm import outcome, same, small_unet
from torch.nn import functional as F

from mifo.acceleration import gated_gelu as gated_gelu_module
from mifo.acceleration.channels_last import keep_channels_last
from mifo.acceleration.gated_gelu import gated_gelu
from mifo.acceleration.graphs import capture

# relative; the interpreter cuts where a GPU rounds
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def in_64_bits(projected, dy):
    exact = projected.detach().double().requires_grad_()
    hidden, gate = exact.chunk(2, -1)
    y = hidden * F.gelu(gate)
    return y.detach(), *torch.autograd.grad(y, exact, dy.double())


def found(projected, dy):
    projected = projected.detach().requires_grad_()
    y = gated_gelu(projected)
    return y.detach(), *torch.autograd.grad(y, projected, dy)


def agrees(shape, dtype=torch.float32, device="cpu", strided=False):
    """Compare result and gradient with PyTorch's own in 64 bits."""
    torch.manual_seed(0)
    projected = torch.randn(shape).mul(2).to(device, dtype)
    dy = torch.randn(*shape[:-1], shape[-1] // 2).to(device, dtype)
    if strided:
        projected, dy = (each.mT.contiguous().mT for each in (projected, dy))
        assert not projected.is_contiguous() and not dy.is_contiguous()
    for ours, theirs in zip(found(projected, dy), in_64_bits(projected, dy), strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        # where GELU's slope changes its sign, large factors enlarge what float32 rounds
        near_zero = 1e-6 * theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=TOLERANCES[dtype], atol=near_zero)


def check_precision(device="cpu"):
    """GELU and its slope, also far from zero."""
    gate = torch.cat([torch.linspace(-12, 12, 4094), torch.tensor([-1e30, 1e30])]).to(device)
    projected = torch.stack([torch.ones_like(gate), gate], -1).view(-1, 8, 2).mT.reshape(-1, 16)
    dy = torch.ones(len(projected), 8, device=device)
    for ours, theirs in zip(found(projected, dy), in_64_bits(projected, dy), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-7, atol=8e-7)


def check_in_interpreter():
    """The kernels on the processor, whatever a GPU would take."""
    gated_gelu_module._has_kernels = lambda projected: True
    agrees((3, 2 * 1280))
    agrees((5, 7, 2 * 40))
    agrees((17, 2 * 320), torch.bfloat16)
    agrees((2, 9, 2 * 264), torch.float16)
    agrees((2 * 8,), torch.float16)
    agrees((2, 9, 2 * 40), strided=True)
    agrees((9, 2 * 320), torch.bfloat16, strided=True)
    with torch.autocast("cpu", torch.bfloat16):
        agrees((9, 2 * 40))
    check_precision()
    check_memory()
    check_unet()


def check_memory():
    """Nothing but the projection waits for the gradient."""
    projected, kept = torch.randn(3, 16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda each: each):
        gated_gelu(projected)
    assert [each.data_ptr() for each in kept] == [projected.data_ptr()]


def check_unet():
    unet = small_unet()
    plain = outcome(unet)
    keep_channels_last(unet)
    same(outcome(unet), plain, 1e-4)


def test_kernels_in_the_interpreter():
    run_in_interpreter("import test_gated_gelu; test_gated_gelu.check_in_interpreter()")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4, 32), (5, 6), (0, 16)])
def test_elsewhere_it_is_that_of_pytorch(shape, dtype):
    projected = torch.randn(shape, dtype=dtype, requires_grad=True)
    hidden, gate = projected.chunk(2, -1)
    y = hidden * F.gelu(gate)
    assert torch.equal(gated_gelu(projected), y)
    dy = torch.randn_like(y)
    assert torch.equal(found(projected, dy)[1], *torch.autograd.grad(y, projected, dy))


def feed_forwards(unet):
    return [each for each in unet.modules() if isinstance(each, GEGLU)]


def test_a_u_net_kept_channels_last_computes_the_same():
    unet = small_unet()
    names, plain = list(unet.state_dict()), outcome(unet)
    for _ in range(2):
        keep_channels_last(unet)
        assert feed_forwards(unet) and not [each for each in feed_forwards(unet) if type(each) is GEGLU]
        assert list(unet.state_dict()) == names
        same(outcome(unet), plain, 1e-5)


def test_subclasses_of_others_stay():
    class Other(GEGLU):
        pass

    unet = small_unet()
    feed_forwards(unet)[0].__class__ = Other
    keep_channels_last(unet)
    assert type(feed_forwards(unet)[0]) is Other


@pytest.mark.parametrize("first", [True, False])
def test_projections_may_have_adapters(first):
    peft = pytest.importorskip("peft")
    unet, adapted = small_unet(), small_unet()
    if first:
        keep_channels_last(adapted)
    for each in (unet, adapted):
        torch.manual_seed(2)
        each.add_adapter(peft.LoraConfig(r=2, target_modules=["net.0.proj"], init_lora_weights=False))
    if not first:
        keep_channels_last(adapted)
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16)
    torch.testing.assert_close(adapted(latents, 10, text).sample, unet(latents, 10, text).sample)
    unet.disable_adapters()
    assert not torch.allclose(adapted(latents, 10, text).sample, unet(latents, 10, text).sample)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kernels_on_a_gpu(dtype):
    assert gated_gelu_module._has_kernels(torch.ones(3, 16, device="cuda", dtype=dtype))
    assert not gated_gelu_module._has_kernels(torch.ones(3, 24, device="cuda", dtype=dtype))
    assert not gated_gelu_module._has_kernels(torch.ones(0, 16, device="cuda", dtype=dtype))
    for shape in ((2, 4096, 2560), (8, 64, 10240), (3, 77, 80), (1, 16), (5, 7, 528)):
        agrees(shape, dtype, "cuda")
        with torch.autocast("cuda", torch.bfloat16):
            agrees(shape, dtype, "cuda")
    agrees((3, 77, 80), dtype, "cuda", strided=True)
    if dtype == torch.float32:
        check_precision("cuda")


@pytest.mark.gpu
def test_unaligned_memory_on_a_gpu():
    torch.manual_seed(0)
    projected = torch.randn(7 * 80 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(7, 80)
    dy = torch.randn(7 * 40 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(7, 40)
    for ours, theirs in zip(found(projected, dy), found(projected.clone(), dy.clone()), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
def test_more_numbers_than_32_bits_count_on_a_gpu():
    if torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("needs 16 GiB")
    projected = torch.zeros(2**17 + 1, 2**14, device="cuda", dtype=torch.bfloat16)
    projected[-1].normal_()
    dy = torch.ones(1, 1, device="cuda", dtype=torch.bfloat16).expand(len(projected), 2**13)
    for ours, theirs in zip(found(projected, dy), found(projected[-1:], dy[-1:]), strict=True):
        assert torch.equal(ours[-1:], theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kernels_in_a_graph(dtype):
    torch.manual_seed(0)
    projected = torch.randn(2, 256, 2560, device="cuda", dtype=dtype)
    dy = torch.randn(2, 256, 1280, device="cuda", dtype=dtype)
    replayed = capture(found, (projected, dy))
    for factor in (1, 2):
        pairs = zip(replayed(projected * factor, dy), found(projected * factor, dy), strict=True)
        for ours, theirs in pairs:
            assert torch.equal(ours, theirs)
