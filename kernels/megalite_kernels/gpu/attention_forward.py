"""Attention's forward pass in Triton: softmax over tiles of keys with a running maximum.

Source:  Dao 2023 (FlashAttention-2), algorithm 1
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.gpu.attention_tiles import (
    LOG2_E,
    block_and_head,
    constants,
    key_tiles,
    keys_of,
    load_tile,
    masked_tile,
    readable,
    section,
    store_tile,
    strides,
)
from megalite_kernels.gpu.launch import launch, narrow


@triton.jit
def _attend(
    acc, total, top, q, k, v, tile, k_row, v_row, keys, first, stop, scale,
    BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    MASKED: tl.constexpr, BANDED: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to the running output, sum and maximum; scale is in base 2."""
    start = tile * BLOCK_N
    scores = tl.dot(
        q, load_tile(k, start, keys, k_row, BLOCK_N, DIM, BLOCK_DIM, MASKED).T, input_precision="ieee"
    )
    if MASKED:
        key = start + tl.arange(0, BLOCK_N)
        visible = key[None, :] < stop[:, None]
        if BANDED:
            visible = visible & (key[None, :] >= first[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    raised = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - raised[:, None])
    shrink = tl.exp2(top - raised)
    values = load_tile(v, start, keys, v_row, BLOCK_N, DIM, BLOCK_DIM, MASKED)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, total * shrink + tl.sum(p, 1), raised


@triton.jit(do_not_specialize=["queries", "keys", "window", "blocks", "together"])
def _attention_forward(
    q, k, v, o, lse, low, high,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, o_batch, o_row, o_head,
    queries, keys, heads, group, all_heads, window, scale, blocks, together,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, HAS_SPANS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    block, place = block_and_head(blocks, all_heads, together, CAUSAL)
    batch, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // group * k_head
    v += batch * v_batch + head // group * v_head
    if HAS_SPANS:
        low += batch * queries
        high += batch * queries

    start = block * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    first, stop = keys_of(row, low, high, queries, keys, window, CAUSAL, WINDOWED, HAS_SPANS)
    begin, whole, partial, end = key_tiles(
        start, low, high, queries, keys, window, CAUSAL, WINDOWED, HAS_SPANS, BLOCK_M, BLOCK_N
    )

    scale = narrow(scale)
    tile_q = load_tile(q, start, queries, q_row, BLOCK_M, DIM, BLOCK_DIM, True)
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Finite, so that a tile of which a row sees nothing leaves the row as it was.
    top = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    BANDED: tl.constexpr = WINDOWED or HAS_SPANS
    for tile in range(whole, partial):
        acc, total, top = _attend(
            acc, total, top, tile_q, k, v, tile, k_row, v_row, keys, first, stop, scale,
            BLOCK_N, DIM, BLOCK_DIM, False, BANDED,
        )  # fmt: skip
    for turn in range(whole - begin + end - partial):
        tile = masked_tile(turn, begin, whole, partial)
        acc, total, top = _attend(
            acc, total, top, tile_q, k, v, tile, k_row, v_row, keys, first, stop, scale,
            BLOCK_N, DIM, BLOCK_DIM, True, BANDED,
        )  # fmt: skip

    o += batch * o_batch + head * o_head
    store_tile(o, acc / total[:, None], start, queries, o_row, BLOCK_M, DIM, BLOCK_DIM)
    logsumexp = (top + tl.log2(total)) / LOG2_E
    tl.store(lse + place.to(tl.int64) * queries + row, logsumexp, mask=row < queries)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor | None,
    high: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [batch, queries, heads, d] in q's dtype and log-sum-exp [batch, heads, queries] in fp32.

    low, high [batch, queries] int32 are the spans of keys where documents shape them; they then hold
    causality and window already.
    """
    q, k, v = readable(q), readable(k), readable(v)
    batch, queries, heads, _ = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if not o.numel():
        return o, lse
    options = constants("forward", q)
    blocks = triton.cdiv(queries, options["BLOCK_M"])
    launch(
        _attention_forward,
        (blocks * batch * heads,),
        *(q, k, v, o, lse, lse if low is None else low, lse if high is None else high),
        *(*strides(q), *strides(k), *strides(v), *strides(o)),
        *(queries, keys, heads, group, batch * heads),
        *(window, scale * LOG2_E.value, blocks, section(k, sharing=group)),
        CAUSAL=causal,
        WINDOWED=window > 0 and low is None,
        HAS_SPANS=low is not None,
        **options,
    )
    return o, lse
