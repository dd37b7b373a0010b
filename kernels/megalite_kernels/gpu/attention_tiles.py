"""What attention's kernels share: which tiles a program visits, how it reads one, in what order programs run.

A row of scores is nonzero on one span: the keys that a query sees. Spans never move back from one query
to the next, so those of a block begin with its first row's and end with its last row's, and every key
between them is seen by some row. The same holds for the queries that see a key. So the forward pass and dQ
(rows are queries, columns keys) and the pass for dK and dV (rows are keys, columns queries) walk their
tiles by the same few lines, and none is visited in vain.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.gpu.launch import DTYPES
from megalite_kernels.tiles import tile

MAX_HEAD_DIM = 256
LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x · LOG2_E)
_SECTION_BYTES = 16 << 20  # of streamed heads at a time: what the second-level cache holds of all that runs


@triton.jit
def keys_of(query, low, high, queries, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
            HAS_SPANS: tl.constexpr):  # fmt: skip
    """The span [first, stop) of keys each query sees; a query beyond the last counts as the last."""
    query = tl.minimum(query, queries - 1)
    if HAS_SPANS:
        return tl.load(low + query), tl.load(high + query)
    position = query + (keys - queries)
    first, stop = position * 0, position * 0 + keys
    if WINDOWED:
        first = tl.maximum(position - window + 1, 0)
        stop = tl.minimum(position + window, keys)
    if CAUSAL:
        stop = position + 1
    return first, stop


@triton.jit
def queries_of(key, first, stop, queries, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
               HAS_SPANS: tl.constexpr):  # fmt: skip
    """The span [first, stop) of queries that see each key; a key beyond the last counts as the last."""
    key = tl.minimum(key, keys - 1)
    if HAS_SPANS:
        return tl.load(first + key), tl.load(stop + key)
    query = key - (keys - queries)
    start, end = query * 0, query * 0 + queries
    if WINDOWED:
        start = tl.maximum(query - window + 1, 0)
        end = tl.maximum(tl.minimum(query + window, queries), 0)
    if CAUSAL:
        start = tl.maximum(query, 0)
    return start, end


@triton.jit
def key_tiles(start, low, high, queries, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
              HAS_SPANS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """`_ranges` of the keys that queries start … start + ROWS see."""
    first, stop = keys_of(start, low, high, queries, keys, window, CAUSAL, WINDOWED, HAS_SPANS)
    last_first, last_stop = keys_of(
        start + ROWS - 1, low, high, queries, keys, window, CAUSAL, WINDOWED, HAS_SPANS
    )
    return _ranges(first, stop, last_first, last_stop, TILE)


@triton.jit
def query_tiles(start, first_of, stop_of, queries, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
                HAS_SPANS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """`_ranges` of the queries that see keys start … start + ROWS."""
    first, stop = queries_of(start, first_of, stop_of, queries, keys, window, CAUSAL, WINDOWED, HAS_SPANS)
    last_first, last_stop = queries_of(
        start + ROWS - 1, first_of, stop_of, queries, keys, window, CAUSAL, WINDOWED, HAS_SPANS
    )
    return _ranges(first, stop, last_first, last_stop, TILE)


@triton.jit
def _ranges(first, stop, last_first, last_stop, TILE: tl.constexpr):
    """Column tiles of a block of rows, from the spans of its first and its last row.

    Tiles [begin, whole) and [partial, end) need a mask; [whole, partial) are seen whole by every row.
    """
    begin, end = first // TILE, tl.cdiv(last_stop, TILE)
    whole = tl.cdiv(last_first, TILE)
    partial = tl.maximum(stop // TILE, whole)
    return begin, whole, partial, end


@triton.jit
def masked_tile(turn, begin, whole, partial):
    """The turn-th of the tiles [begin, whole), [partial, …)."""
    left = whole - begin
    return tl.where(turn < left, begin + turn, partial + turn - left)


@triton.jit
def load_tile(base, start, rows, stride, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """[ROWS, BLOCK_DIM] from row `start` of a [rows, DIM] matrix; zero beyond DIM and, if MASKED, rows."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    # A tile's own offsets fit 32 bits; where it starts may not.
    place = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    if MASKED and BLOCK_DIM > DIM:
        return tl.load(place, mask=(start + row < rows)[:, None] & (column < DIM)[None, :], other=0.0)
    if MASKED:
        return tl.load(place, mask=(start + row < rows)[:, None], other=0.0)
    if BLOCK_DIM > DIM:
        return tl.load(place, mask=(column < DIM)[None, :], other=0.0)
    return tl.load(place)


@triton.jit
def store_tile(base, value, start, rows, stride, ROWS: tl.constexpr, DIM: tl.constexpr,
               BLOCK_DIM: tl.constexpr):  # fmt: skip
    """The inverse of a masked `load_tile`, rounding once."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    place = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    inside = (start + row < rows)[:, None] & (column < DIM)[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def block_and_head(blocks, heads, together, LAST_FIRST: tl.constexpr):
    """This program's block of rows and its head of heads = batch · heads.

    Heads run in sections of `together`, so that what they stream stays in the cache; within a section the
    longest blocks of all heads come first, which leaves short ones to fill the end.
    """
    program = tl.program_id(0)
    section = program // (together * blocks)
    inside = program - section * together * blocks
    width = tl.minimum(together, heads - section * together)
    block = inside // width
    head = section * together + inside - block * width
    if LAST_FIRST:
        block = blocks - 1 - block
    return block, head


def section(streamed: Tensor, streams: int = 1, sharing: int = 1) -> int:
    """How many heads run together where every `sharing` of them read the same `streams` heads of two
    tensors like `streamed` [batch, rows, heads, d]."""
    each = 2 * streams * streamed.shape[1] * streamed.shape[3] * streamed.element_size()
    return max(_SECTION_BYTES // max(each, 1), 1) * sharing


def constants(direction: str, x: Tensor) -> dict[str, int]:
    """Tile sizes and launch options of a pass over heads like x's [batch, rows, heads, d]."""
    dim = int(x.shape[-1])  # a symbol while torch traces: each head size is a kernel of its own
    if dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {dim}; the Triton attention takes up to {MAX_HEAD_DIM}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{x.dtype}; the Triton attention takes {', '.join(map(str, DTYPES))}")
    block = max(triton.next_power_of_2(dim), 64)
    variant = f"{direction}/{block}" + ("/fp32" if x.dtype == torch.float32 else "")
    return {"DIM": dim, "BLOCK_DIM": block, **tile("attention", variant, x.device)}


def readable(x: Tensor) -> Tensor:
    """x itself if a kernel can read its rows by strides, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, row and head of [batch, rows, heads, d]."""
    return x.stride(0), x.stride(1), x.stride(2)
