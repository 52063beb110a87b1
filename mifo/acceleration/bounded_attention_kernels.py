"""Attention bounded by bits, and its gradients, as Triton kernels; called by `bounded_attention.py`.

A program holds a tile of queries, or of keys in the kernel of their gradients, and passes over tiles of the
other kind: no score leaves it. Products take 16 bits and sum in 32, all other arithmetic is in float32 with
exponentials of base 2, and no result depends on the order in which programs run.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ENOUGH = 256  # programs: about two for each multiprocessor of a large GPU
LOWEST = tl.constexpr(-(2.0**60))  # below any open score, but so far above closed ones that they vanish
LN_2 = tl.constexpr(math.log(2))


class Tiles(NamedTuple):
    """How a kernel is cut into tiles.

    Attributes:
        held: rows that a program holds.
        passed: rows of each tile that it passes over.
        alone: most rows that it passes over in one tile if there are no more, as those of a text.
        warps: of a program.
        stages: tiles passed over that are in memory at once, for the next ones are loaded meanwhile.
    """

    held: int
    passed: int
    alone: int
    warps: int
    stages: int


# by the width of a head; compiled for an H100 they leave all numbers in registers
OF_RESULTS = {
    16: Tiles(128, 64, 128, 8, 3),
    32: Tiles(128, 64, 128, 8, 3),
    64: Tiles(128, 64, 128, 8, 3),
    128: Tiles(128, 64, 64, 8, 3),
}
OF_QUERIES = {
    16: Tiles(128, 64, 128, 8, 3),
    32: Tiles(128, 64, 128, 8, 3),
    64: Tiles(128, 64, 128, 8, 3),
    128: Tiles(128, 64, 64, 8, 2),
}
OF_CONTEXT = {
    16: Tiles(128, 64, 32, 8, 3),
    32: Tiles(128, 64, 32, 8, 3),
    64: Tiles(128, 64, 32, 8, 3),
    128: Tiles(128, 32, 32, 8, 2),
}


def tiles_for(table: dict[int, Tiles], held: Tensor, passed: int) -> Tiles:
    """Tiles of (B, heads, rows, d), held, and of a number of rows to pass over.

    Where too few programs would have work, each holds half and has half of the warps. Few rows are passed
    over in one tile, with none to load ahead; those that do not fill tiles in smaller ones, for checks which
    rows exist take registers.
    """
    batch, heads, rows, width = held.shape
    tiles = table[width]
    if triton.cdiv(rows, tiles.held) * heads * batch < ENOUGH:
        tiles = tiles._replace(held=tiles.held // 2, warps=tiles.warps // 2)
    if passed <= tiles.alone:
        return tiles._replace(passed=max(triton.next_power_of_2(passed), 16), stages=1)
    if passed % tiles.passed:
        return tiles._replace(passed=tiles.passed // 2)
    return tiles


def attended(
    query: Tensor, key: Tensor, value: Tensor, query_bits: Tensor, key_bits: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The attended values, and what their gradients need.

    Args:
        query: (B, heads, n, d), float16 or bfloat16; d is in the tables above and has stride 1.
        key, value: (B, heads, m, d), likewise.
        query_bits, key_bits: int32 (B, n) and (B, m); only the first stride may be other than 1.
        scale: of the scores, positive.

    Returns:
        y as query, in memory (B, n, heads, d), and the logarithm of base 2 of the sum of exponentials for
        each query, (B, heads, n), float32.
    """
    known = (query, key, value, query_bits, key_bits)
    y = _by_rows(query)
    level = query.new_empty(query.shape[:3], dtype=torch.float32)
    tiles = tiles_for(OF_RESULTS, query, key.shape[2])
    with torch.cuda.device_of(query):
        _attend[_grid(query, tiles)](
            *known, y, level, **_sizes(*known, scale), **_cut(query, key, tiles.held, tiles.passed, tiles)
        )
    return y, level


def gradients(
    dy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bits: Tensor,
    key_bits: Tensor,
    y: Tensor,
    level: Tensor,
    scale: float,
    of_context: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key and value, from what `attended` was given and gave.

    Args:
        dy: as y, also in memory.
        of_context: whether those of key and value are wanted.

    Returns:
        As query, key and value, in memory (B, rows, heads, d); None for those not wanted.
    """
    known = (query, key, value, query_bits, key_bits)
    sizes = _sizes(*known, scale)
    products, dquery = torch.empty_like(level), _by_rows(query)
    dkey, dvalue = (_by_rows(each) if of_context else None for each in (key, value))
    with torch.cuda.device_of(query):
        tiles = tiles_for(OF_QUERIES, query, key.shape[2])
        _query_gradient[_grid(query, tiles)](
            *(*known, y, dy, level, products, dquery),
            **sizes,
            **_cut(query, key, tiles.held, tiles.passed, tiles),
        )
        if of_context:
            tiles = tiles_for(OF_CONTEXT, key, query.shape[2])
            _context_gradients[_grid(key, tiles)](
                *(*known, dy, level, products, dkey, dvalue),
                **sizes,
                **_cut(query, key, tiles.passed, tiles.held, tiles),
            )
    return dquery, dkey, dvalue


def _by_rows(x: Tensor) -> Tensor:
    """Memory (B, rows, heads, d) for (B, heads, rows, d) as x, so that merging heads copies nothing."""
    return torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype, device=x.device)


def _grid(held: Tensor, tiles: Tiles) -> tuple[int, int, int]:
    """Tiles of (B, heads, rows, d) along rows, heads, and B."""
    batch, heads, rows, _ = held.shape
    return triton.cdiv(rows, tiles.held), heads, batch


def _sizes(
    query: Tensor, key: Tensor, value: Tensor, query_bits: Tensor, key_bits: Tensor, scale: float
) -> dict[str, int | float]:
    """Arguments of all kernels: strides, lengths, and the factor from scores to exponents of base 2."""
    strides = {
        f"{name}_{dimension}": each.stride(index)
        for name, each in (("query", query), ("key", key), ("value", value))
        for index, dimension in enumerate(("batch", "head", "row"))
    }
    return strides | {
        "query_bits_batch": query_bits.stride(0),
        "key_bits_batch": key_bits.stride(0),
        "n": query.shape[2],
        "m": key.shape[2],
        "factor": scale * math.log2(math.e),
    }


def _cut(query: Tensor, key: Tensor, queries: int, keys: int, tiles: Tiles) -> dict[str, int | bool]:
    """Arguments that all kernels are compiled for, of tiles of so many queries and keys."""
    return {
        "WIDTH": query.shape[3],
        "QUERIES": queries,
        "KEYS": keys,
        "EVEN_QUERIES": query.shape[2] % queries == 0,
        "EVEN_KEYS": key.shape[2] % keys == 0,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


@triton.jit
def _attend(
    query,
    key,
    value,
    query_bits,
    key_bits,
    y,
    level,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    query_bits_batch,
    key_bits_batch,
    n,
    m,
    factor,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN_QUERIES: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
):
    """Exponentials are relative to the highest score met so far, and sums fade as a higher one is met."""
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    column = tl.arange(0, KEYS)
    queries_at = _rows(query, query_batch, query_head, query_row, row, WIDTH)
    keys_at = _rows(key, key_batch, key_head, key_row, column, WIDTH)
    values_at = _rows(value, value_batch, value_head, value_row, column, WIDTH)
    bits_at = _numbers(key_bits, key_bits_batch, 0, column)
    queries = _load(queries_at, (row < n)[:, None], EVEN_QUERIES)
    bits = _load(_numbers(query_bits, query_bits_batch, 0, row), row < n, EVEN_QUERIES)
    highest = tl.full([QUERIES], LOWEST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    weighted = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(0, m, KEYS):
        inside = start + column < m
        keys = _load(keys_at + start * key_row, inside[:, None], EVEN_KEYS)
        values = _load(values_at + start * value_row, inside[:, None], EVEN_KEYS)
        seen = (bits[:, None] & _load(bits_at + start, inside, EVEN_KEYS)[None, :]) != 0
        # -2^100, computed anew: an exponential ends a block of code, and where one block both makes and uses
        # the conditions, Triton 3.6 packs them into words and unpacks them, a seventh of its instructions
        closed = -tl.exp2(tl.minimum(start + 100.0, 100.0))
        scores = tl.where(seen, tl.dot(queries, keys.T), closed)
        higher = tl.maximum(highest, tl.max(scores, 1))
        exponentials = tl.exp2(scores * factor - (higher * factor)[:, None])
        fading = tl.exp2((highest - higher) * factor)
        total = total * fading + tl.sum(exponentials, 1)
        weighted = tl.dot(exponentials.to(values.dtype), values, weighted * fading[:, None])
        highest = higher
    y_at = _own_rows(y, n, row, WIDTH)
    _store(y_at, weighted / total[:, None], (row < n)[:, None], EVEN_QUERIES)
    level_at = _numbers(level, tl.num_programs(1) * n, n, row)
    _store(level_at, highest * factor + tl.log2(total), row < n, EVEN_QUERIES)


@triton.jit
def _query_gradient(
    query,
    key,
    value,
    query_bits,
    key_bits,
    y,
    dy,
    level,
    products,
    dquery,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    query_bits_batch,
    key_bits_batch,
    n,
    m,
    factor,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN_QUERIES: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
):
    """Also the product of each query's result and its gradient, which `_context_gradients` reads."""
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    column = tl.arange(0, KEYS)
    queries_at = _rows(query, query_batch, query_head, query_row, row, WIDTH)
    keys_at = _rows(key, key_batch, key_head, key_row, column, WIDTH)
    values_at = _rows(value, value_batch, value_head, value_row, column, WIDTH)
    bits_at = _numbers(key_bits, key_bits_batch, 0, column)
    queries = _load(queries_at, (row < n)[:, None], EVEN_QUERIES)
    bits = _load(_numbers(query_bits, query_bits_batch, 0, row), row < n, EVEN_QUERIES)
    slopes = _load(_own_rows(dy, n, row, WIDTH), (row < n)[:, None], EVEN_QUERIES)
    results = _load(_own_rows(y, n, row, WIDTH), (row < n)[:, None], EVEN_QUERIES)
    own_products = tl.sum(results.to(tl.float32) * slopes.to(tl.float32), 1)
    of_head = tl.num_programs(1) * n
    _store(_numbers(products, of_head, n, row), own_products, row < n, EVEN_QUERIES)
    levels = _load(_numbers(level, of_head, n, row), row < n, EVEN_QUERIES)
    gradient = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(0, m, KEYS):
        inside = start + column < m
        keys = _load(keys_at + start * key_row, inside[:, None], EVEN_KEYS)
        values = _load(values_at + start * value_row, inside[:, None], EVEN_KEYS)
        seen = (bits[:, None] & _load(bits_at + start, inside, EVEN_KEYS)[None, :]) != 0
        exponents = tl.dot(queries, keys.T) * factor - levels[:, None]
        probabilities = tl.where(seen, tl.exp2(exponents), 0.0)
        of_scores = probabilities * (tl.dot(slopes, values.T) - own_products[:, None])
        gradient = tl.dot(of_scores.to(keys.dtype), keys, gradient)
    dquery_at = _own_rows(dquery, n, row, WIDTH)
    _store(dquery_at, gradient * (factor * LN_2), (row < n)[:, None], EVEN_QUERIES)


@triton.jit
def _context_gradients(
    query,
    key,
    value,
    query_bits,
    key_bits,
    dy,
    level,
    products,
    dkey,
    dvalue,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    query_bits_batch,
    key_bits_batch,
    n,
    m,
    factor,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN_QUERIES: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
):
    """Scores are transposed, [KEYS, QUERIES], so that probabilities are multiplied from registers."""
    row = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    column = tl.arange(0, QUERIES)
    queries_at = _rows(query, query_batch, query_head, query_row, column, WIDTH)
    slopes_at = _own_rows(dy, n, column, WIDTH)
    of_head = tl.num_programs(1) * n
    levels_at = _numbers(level, of_head, n, column)
    products_at = _numbers(products, of_head, n, column)
    bits_at = _numbers(query_bits, query_bits_batch, 0, column)
    inside_keys = (row < m)[:, None]
    keys = _load(_rows(key, key_batch, key_head, key_row, row, WIDTH), inside_keys, EVEN_KEYS)
    values = _load(_rows(value, value_batch, value_head, value_row, row, WIDTH), inside_keys, EVEN_KEYS)
    bits = _load(_numbers(key_bits, key_bits_batch, 0, row), row < m, EVEN_KEYS)
    of_keys = tl.zeros([KEYS, WIDTH], tl.float32)
    of_values = tl.zeros([KEYS, WIDTH], tl.float32)
    for start in range(0, n, QUERIES):
        inside = start + column < n
        queries = _load(queries_at + start * query_row, inside[:, None], EVEN_QUERIES)
        slopes = _load(slopes_at + start * (tl.num_programs(1) * WIDTH), inside[:, None], EVEN_QUERIES)
        levels = _load(levels_at + start, inside, EVEN_QUERIES)
        their_products = _load(products_at + start, inside, EVEN_QUERIES)
        seen = (bits[:, None] & _load(bits_at + start, inside, EVEN_QUERIES)[None, :]) != 0
        exponents = tl.dot(keys, queries.T) * factor - levels[None, :]
        probabilities = tl.where(seen, tl.exp2(exponents), 0.0)
        of_values = tl.dot(probabilities.to(slopes.dtype), slopes, of_values)
        of_scores = probabilities * (tl.dot(values, slopes.T) - their_products[None, :])
        of_keys = tl.dot(of_scores.to(queries.dtype), queries, of_keys)
    _store(_own_rows(dkey, m, row, WIDTH), of_keys * (factor * LN_2), inside_keys, EVEN_KEYS)
    _store(_own_rows(dvalue, m, row, WIDTH), of_values, inside_keys, EVEN_KEYS)


@triton.jit
def _rows(x, of_batch, of_head, of_row, row, WIDTH: tl.constexpr):
    """Addresses of rows of the program's head, [rows, WIDTH]; only where it begins needs 64 bits."""
    first = tl.program_id(2).to(tl.int64) * of_batch + tl.program_id(1).to(tl.int64) * of_head
    return x + first + (row[:, None] * of_row + tl.arange(0, WIDTH)[None, :])


@triton.jit
def _own_rows(x, length, row, WIDTH: tl.constexpr):
    """`_rows` of memory (B, length, heads, WIDTH)."""
    of_row = tl.num_programs(1) * WIDTH
    return _rows(x, length * of_row, WIDTH, of_row, row, WIDTH)


@triton.jit
def _numbers(x, of_batch, of_head, row):
    """Addresses of one number for each row of the program's head, [rows]."""
    return x + tl.program_id(2).to(tl.int64) * of_batch + tl.program_id(1).to(tl.int64) * of_head + row


@triton.jit
def _load(at, inside, EVEN: tl.constexpr):
    """Numbers at addresses, 0 outside; `EVEN` promises that all are inside."""
    return tl.load(at) if EVEN else tl.load(at, inside, 0)


@triton.jit
def _store(at, numbers, inside, EVEN: tl.constexpr):
    if EVEN:
        tl.store(at, numbers)
    else:
        tl.store(at, numbers, inside)
