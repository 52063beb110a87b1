"""Attention bounded by bits: its kernels, in an interpreter and on a GPU."""

import pytest
import torch
from interpreted import run_in_interpreter

from mifo.acceleration.bounded_attention import bounded_attention, runs_as_kernels
from mifo.acceleration.graphs import capture

# relative to each number and to the largest: probabilities and the scores' gradients are rounded as well
TOLERANCES = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
BITS = (1, 1 << 5, -(2**31))


def rows_first(*shape):
    return torch.randn(shape).transpose(1, 2)


def heads_first(*shape):
    return rows_first(*shape).contiguous()


def chunk(*shape):
    """As it comes from a projection to keys and values of twice the images."""
    batch, rows, heads, width = shape
    return torch.randn(2 * batch, rows, 2 * heads, width).chunk(2)[1].chunk(2, 2)[1].transpose(1, 2)


LAYOUTS = ((heads_first, rows_first, chunk), (rows_first, chunk, chunk), (chunk, heads_first, rows_first))


def drawn(shape, dtype, device="cpu", bit_rows=(1, 1), layouts=(rows_first,) * 3):
    """Queries, keys and values, bits of both, and the gradient of the result.

    Args:
        shape: images, heads, queries, keys and the width of a head.
        bit_rows: of queries and of keys, images or 1.
        layouts: of queries, keys and values.
    """
    torch.manual_seed(0)
    batch, heads, n, m, width = shape
    lengths = (n, m, m)
    numbers = [layout(batch, length, heads, width) for layout, length in zip(layouts, lengths, strict=True)]
    dy = rows_first(batch, n, heads, width)
    choice = torch.tensor(BITS, dtype=torch.int32)
    query_bits = choice[torch.randint(len(BITS), (bit_rows[0], n))]
    key_bits = choice[torch.randint(len(BITS), (2, bit_rows[1], m))].sum(0, dtype=torch.int32)
    key_bits[:, -1] = -1
    query, key, value, dy = (each.to(device, dtype) for each in (*numbers, dy))
    return query, key, value, query_bits.to(device), key_bits.to(device), dy


def in_64_bits(query, key, value, query_bits, key_bits, dy):
    learnt = [each.detach().double().requires_grad_() for each in (query, key, value)]
    ones = [torch.stack([each >> place & 1 for place in range(32)], -1) for each in (query_bits, key_bits)]
    closed = ones[0].double() @ ones[1].double().mT == 0
    scores = learnt[0] @ learnt[1].mT * query.shape[-1] ** -0.5
    y = scores.masked_fill(closed[:, None], -torch.inf).softmax(-1) @ learnt[2]
    return y.detach(), *torch.autograd.grad(y, learnt, dy.double())


def found(query, key, value, query_bits, key_bits, dy):
    learnt = [each.detach().requires_grad_() for each in (query, key, value)]
    y = bounded_attention(*learnt, query_bits, key_bits, query.shape[-1] ** -0.5)
    return y.detach(), *torch.autograd.grad(y, learnt, dy)


def compare(inputs):
    """Compare result and gradients with those in 64 bits."""
    dtype = inputs[0].dtype
    for ours, theirs in zip(found(*inputs), in_64_bits(*inputs), strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        limit = TOLERANCES[dtype]
        largest = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=limit, atol=limit * largest)


def agrees(shape, dtype, **options):
    compare(drawn(shape, dtype, **options))


def check_in_interpreter():
    """The kernels on the processor, which can not multiply bfloat16."""
    check_shapes()
    check_bits()
    check_closed_tiles()
    check_layouts()
    check_wanted_gradients()


def check_shapes():
    from mifo.acceleration import bounded_attention_kernels as kernels

    for shape in (
        (1, 2, 128, 192, 64),
        (1, 1, 192, 128, 16),
        (1, 2, 150, 150, 32),
        (2, 1, 70, 77, 64),
        (1, 1, 70, 77, 128),
        (1, 1, 3, 5, 16),
    ):
        agrees(shape, torch.float16)
    kernels.ENOUGH = 1  # tiles for a GPU that is full
    agrees((1, 1, 256, 128, 64), torch.float16)
    agrees((1, 1, 130, 300, 16), torch.float16)


def check_bits():
    for bit_rows in ((1, 2), (2, 1), (2, 2)):
        agrees((2, 1, 40, 50, 16), torch.float16, bit_rows=bit_rows)


def check_closed_tiles(device="cpu"):
    """Queries that see none of the keys they meet first, or the last alone, whatever the others' scores."""
    query, key, value, query_bits, key_bits, dy = drawn((1, 1, 192, 192, 16), torch.float16, device)
    key[:, :, :130] *= 100
    for bit in BITS:
        query_bits[:], query_bits[:, ::4] = bit, 2
        key_bits[:, :130], key_bits[:, 130:], key_bits[:, -1] = 4, bit, bit | 2
        compare((query, key, value, query_bits, key_bits, dy))


def check_layouts():
    for layouts in LAYOUTS:
        agrees((2, 2, 40, 150, 16), torch.float16, layouts=layouts)
    query, key, value, *bits, _ = drawn((2, 2, 20, 30, 16), torch.float16)
    dy = torch.ones((), dtype=torch.float16).expand_as(query)
    plain = found(query, key, value, *bits, dy.clone())
    assert all(each.transpose(1, 2).is_contiguous() for each in plain)
    strided = (each.mT.contiguous().mT for each in (query, key, value))
    for ours, theirs in zip(found(*strided, *bits, dy), plain, strict=True):
        assert torch.equal(ours, theirs)


def check_wanted_gradients():
    from mifo.acceleration import bounded_attention_kernels as kernels

    *learnt, query_bits, key_bits, dy = drawn((1, 2, 70, 77, 16), torch.float16)
    theirs = found(*learnt, query_bits, key_bits, dy)[1:]
    for wanted in ((True, False, False), (False, True, False), (True, False, True)):
        ours = [each.detach().requires_grad_(needed) for each, needed in zip(learnt, wanted, strict=True)]
        with pytest.MonkeyPatch.context() as patch:
            if not any(wanted[1:]):
                patch.delattr(kernels, "_context_gradients")
            bounded_attention(*ours, query_bits, key_bits, 0.25).backward(dy)
        for each, gradient, needed in zip(ours, theirs, wanted, strict=True):
            assert torch.equal(each.grad, gradient) if needed else each.grad is None


def test_kernels_in_the_interpreter():
    run_in_interpreter("import test_bounded_attention; test_bounded_attention.check_in_interpreter()")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kernels_on_a_gpu(dtype):
    rows = torch.ones(2, 1, 3, 64, device="cuda", dtype=dtype)
    assert runs_as_kernels(rows, rows, rows, 0.1)
    assert not runs_as_kernels(rows, rows, rows.float(), 0.1)
    assert not runs_as_kernels(*[rows.float()] * 3, 0.1)
    assert not runs_as_kernels(*[rows[..., :40]] * 3, 0.1)
    assert not runs_as_kernels(rows, rows[:1], rows[:1], 0.1)
    assert not runs_as_kernels(rows, rows, rows, -0.1)
    for shape in (
        (1, 5, 4096, 4096, 64),
        (2, 10, 1024, 1024, 64),
        (2, 5, 4096, 77, 64),
        (6, 20, 256, 77, 64),
        (2, 20, 64, 64, 64),
        (3, 2, 1000, 333, 32),
        (1, 1, 3, 5, 16),
        (2, 8, 300, 300, 128),
        (2, 40, 1024, 1024, 128),
    ):
        for bit_rows in ((1, 1), (shape[0], shape[0])):
            agrees(shape, dtype, device="cuda", bit_rows=bit_rows)
    for layouts in LAYOUTS:
        agrees((2, 5, 1024, 77, 64), dtype, device="cuda", layouts=layouts)
    check_closed_tiles("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 5, 4096, 4096, 64), (2, 5, 4096, 77, 64), (2, 3, 500, 300, 32)])
def test_the_same_bits_at_each_call_on_a_gpu(shape, dtype):
    inputs = drawn(shape, dtype, "cuda")
    first = found(*inputs)
    for _ in range(3):
        for ours, theirs in zip(found(*inputs), first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 5, 1024, 1024, 64), (2, 5, 1024, 77, 64)])
def test_kernels_in_a_graph(shape, dtype):
    query, *others = drawn(shape, dtype, "cuda")
    replayed = capture(found, (query, *others))
    for factor in (1, 2):
        pairs = zip(replayed(query * factor, *others), found(query * factor, *others), strict=True)
        for ours, theirs in pairs:
            assert torch.equal(ours, theirs)
