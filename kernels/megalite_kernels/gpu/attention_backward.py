"""Attention's backward pass in Triton: dQ by blocks of queries, then dK and dV by blocks of keys.

With P = exp(scale Q Kᵀ - lse), δ = rowsum(dO ∘ O) - dlse and dS = P ∘ (dO Vᵀ - δ):
dQ = scale dS K;  dK = scale dSᵀ Q;  dV = Pᵀ dO. Each gradient is summed by one program in one order, so
the result is the same bits every time; the price is that P and dO Vᵀ are computed twice.

Source:  Dao 2023 (FlashAttention-2), algorithm 2
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
    queries_of,
    query_tiles,
    readable,
    section,
    store_tile,
    strides,
)
from megalite_kernels.gpu.launch import launch, narrow


@triton.jit
def _add_dq(
    dq, q, do, k, v, lse, delta, tile, k_row, v_row, keys, first, stop, scale,
    BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    MASKED: tl.constexpr, BANDED: tl.constexpr,
):  # fmt: skip
    """Add what a tile of keys gives to dQ, without its factor; scale and lse are in base 2."""
    start = tile * BLOCK_N
    tile_k = load_tile(k, start, keys, k_row, BLOCK_N, DIM, BLOCK_DIM, MASKED)
    tile_v = load_tile(v, start, keys, v_row, BLOCK_N, DIM, BLOCK_DIM, MASKED)
    p = tl.exp2(tl.dot(q, tile_k.T, input_precision="ieee") * scale - lse[:, None])
    if MASKED:
        key = start + tl.arange(0, BLOCK_N)
        visible = key[None, :] < stop[:, None]
        if BANDED:
            visible = visible & (key[None, :] >= first[:, None])
        p = tl.where(visible, p, 0.0)
    ds = p * (tl.dot(do, tile_v.T, input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(tile_k.dtype), tile_k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["queries", "keys", "window", "blocks", "together"])
def _attention_dq(
    q, k, v, o, do, lse, grad_lse, dq, delta, low, high,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    o_batch, o_row, o_head, do_batch, do_row, do_head,
    queries, keys, heads, group, all_heads, window, scale, blocks, together,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, HAS_SPANS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    block, place = block_and_head(blocks, all_heads, together, CAUSAL)
    batch, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // group * k_head
    v += batch * v_batch + head // group * v_head
    o += batch * o_batch + head * o_head
    dq += batch * o_batch + head * o_head
    do += batch * do_batch + head * do_head
    if HAS_SPANS:
        low += batch * queries
        high += batch * queries

    start = block * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    first, stop = keys_of(row, low, high, queries, keys, window, CAUSAL, WINDOWED, HAS_SPANS)
    begin, whole, partial, end = key_tiles(
        start, low, high, queries, keys, window, CAUSAL, WINDOWED, HAS_SPANS, BLOCK_M, BLOCK_N
    )

    # dK and dV need δ too; it is left for them.
    tile_do = load_tile(do, start, queries, do_row, BLOCK_M, DIM, BLOCK_DIM, True)
    tile_o = load_tile(o, start, queries, o_row, BLOCK_M, DIM, BLOCK_DIM, True)
    statistics = place.to(tl.int64) * queries + row
    delta_m = tl.sum(tile_o.to(tl.float32) * tile_do.to(tl.float32), 1)
    delta_m -= tl.load(grad_lse + statistics, mask=row < queries, other=0.0)
    tl.store(delta + statistics, delta_m, mask=row < queries)

    tile_q = load_tile(q, start, queries, q_row, BLOCK_M, DIM, BLOCK_DIM, True)
    lse_m = tl.load(lse + statistics, mask=row < queries, other=0.0) * LOG2_E
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], dtype=tl.float32)
    scale = narrow(scale)
    scale_2 = scale * LOG2_E
    BANDED: tl.constexpr = WINDOWED or HAS_SPANS
    for tile in range(whole, partial):
        acc = _add_dq(
            acc, tile_q, tile_do, k, v, lse_m, delta_m, tile, k_row, v_row, keys, first, stop, scale_2,
            BLOCK_N, DIM, BLOCK_DIM, False, BANDED,
        )  # fmt: skip
    for turn in range(whole - begin + end - partial):
        tile = masked_tile(turn, begin, whole, partial)
        acc = _add_dq(
            acc, tile_q, tile_do, k, v, lse_m, delta_m, tile, k_row, v_row, keys, first, stop, scale_2,
            BLOCK_N, DIM, BLOCK_DIM, True, BANDED,
        )  # fmt: skip
    store_tile(dq, acc * scale, start, queries, o_row, BLOCK_M, DIM, BLOCK_DIM)


@triton.jit
def _add_dkv(
    dk, dv, k, v, q, do, lse, delta, tile, q_row, do_row, queries, first, stop, scale,
    BLOCK_M: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    MASKED: tl.constexpr, BANDED: tl.constexpr,
):  # fmt: skip
    """Add what a tile of queries gives to dK (without its factor) and dV; scale is in base 2.

    Scores lie transposed, [keys, queries], so that P and dS come out as the products' first operands.
    """
    start = tile * BLOCK_M
    query = start + tl.arange(0, BLOCK_M)
    tile_q = load_tile(q, start, queries, q_row, BLOCK_M, DIM, BLOCK_DIM, MASKED)
    tile_do = load_tile(do, start, queries, do_row, BLOCK_M, DIM, BLOCK_DIM, MASKED)
    if MASKED:
        lse_m = tl.load(lse + query, mask=query < queries, other=0.0)
        delta_m = tl.load(delta + query, mask=query < queries, other=0.0)
    else:
        lse_m, delta_m = tl.load(lse + query), tl.load(delta + query)
    p = tl.exp2(tl.dot(k, tile_q.T, input_precision="ieee") * scale - (lse_m * LOG2_E)[None, :])
    if MASKED:
        visible = query[None, :] >= first[:, None]
        if BANDED:
            visible = visible & (query[None, :] < stop[:, None])
        p = tl.where(visible, p, 0.0)
    dv = tl.dot(p.to(tile_do.dtype), tile_do, dv, input_precision="ieee")
    ds = p * (tl.dot(v, tile_do.T, input_precision="ieee") - delta_m[None, :])
    dk = tl.dot(ds.to(tile_q.dtype), tile_q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["queries", "keys", "window", "blocks", "together"])
def _attention_dkv(
    q, k, v, do, lse, delta, dk, dv, first_of, stop_of,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    do_batch, do_row, do_head, dk_batch, dk_row, dk_head,
    queries, keys, kv_heads, group, all_heads, window, scale, blocks, together,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, HAS_SPANS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    # The first keys are seen by the most queries, so the order of blocks is the longest first as it is.
    block, place = block_and_head(blocks, all_heads, together, False)
    batch, head = (place // kv_heads).to(tl.int64), (place % kv_heads).to(tl.int64)
    # A key head meets the queries of its whole group, one head after another.
    q += batch * q_batch + head * group * q_head
    do += batch * do_batch + head * group * do_head
    lse += place.to(tl.int64) * group * queries
    delta += place.to(tl.int64) * group * queries
    if HAS_SPANS:
        first_of += batch * keys
        stop_of += batch * keys

    start = block * BLOCK_N
    row = start + tl.arange(0, BLOCK_N)
    first, stop = queries_of(row, first_of, stop_of, queries, keys, window, CAUSAL, WINDOWED, HAS_SPANS)
    begin, whole, partial, end = query_tiles(
        start, first_of, stop_of, queries, keys, window, CAUSAL, WINDOWED, HAS_SPANS, BLOCK_N, BLOCK_M
    )

    tile_k = load_tile(k + batch * k_batch + head * k_head, start, keys, k_row, BLOCK_N, DIM, BLOCK_DIM, True)
    tile_v = load_tile(v + batch * v_batch + head * v_head, start, keys, v_row, BLOCK_N, DIM, BLOCK_DIM, True)
    acc_k = tl.zeros([BLOCK_N, BLOCK_DIM], dtype=tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DIM], dtype=tl.float32)
    scale = narrow(scale)
    scale_2 = scale * LOG2_E
    BANDED: tl.constexpr = WINDOWED or HAS_SPANS
    count = partial - whole
    for turn in range(group * count):
        member = tl.cast(turn // count, tl.int64)
        acc_k, acc_v = _add_dkv(
            acc_k, acc_v, tile_k, tile_v, q + member * q_head, do + member * do_head,
            lse + member * queries, delta + member * queries, whole + turn % count,
            q_row, do_row, queries, first, stop, scale_2, BLOCK_M, DIM, BLOCK_DIM, False, BANDED,
        )  # fmt: skip
    count = whole - begin + end - partial
    for turn in range(group * count):
        member = tl.cast(turn // count, tl.int64)
        acc_k, acc_v = _add_dkv(
            acc_k, acc_v, tile_k, tile_v, q + member * q_head, do + member * do_head,
            lse + member * queries, delta + member * queries,
            masked_tile(turn % count, begin, whole, partial),
            q_row, do_row, queries, first, stop, scale_2, BLOCK_M, DIM, BLOCK_DIM, True, BANDED,
        )  # fmt: skip
    place_k = batch * dk_batch + head * dk_head
    store_tile(dk + place_k, acc_k * scale, start, keys, dk_row, BLOCK_N, DIM, BLOCK_DIM)
    store_tile(dv + place_k, acc_v, start, keys, dk_row, BLOCK_N, DIM, BLOCK_DIM)


def attention_backward(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    low: Tensor | None,
    high: Tensor | None,
    first: Tensor | None,
    stop: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from those of the output and of log-sum-exp.

    low, high [batch, queries] int32 are the spans of keys a query sees and first, stop [batch, keys] those
    of queries that see a key, where documents shape them.
    """
    q, k, v, grad, grad_lse = readable(q), readable(k), readable(v), readable(grad), grad_lse.contiguous()
    o, lse = o.contiguous(), lse.contiguous()  # they are; dq lies as o does
    batch, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    group = heads // kv_heads
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    mask = {"CAUSAL": causal, "WINDOWED": window > 0 and low is None, "HAS_SPANS": low is not None}
    if dq.numel():
        options = constants("dq", q)
        blocks = triton.cdiv(queries, options["BLOCK_M"])
        launch(
            _attention_dq,
            (blocks * batch * heads,),
            *(q, k, v, o, grad, lse, grad_lse, dq, delta, _or(low, lse), _or(high, lse)),
            *(*strides(q), *strides(k), *strides(v), *strides(o), *strides(grad)),
            *(queries, keys, heads, group, batch * heads),
            *(window, scale, blocks, section(k, sharing=group)),
            **mask,
            **options,
        )
    if dk.numel():
        options = constants("dkv", k)
        blocks = triton.cdiv(keys, options["BLOCK_N"])
        launch(
            _attention_dkv,
            (blocks * batch * kv_heads,),
            *(q, k, v, grad, lse, delta, dk, dv, _or(first, lse), _or(stop, lse)),
            *(*strides(q), *strides(k), *strides(v), *strides(grad), *strides(dk)),
            *(queries, keys, kv_heads, group, batch * kv_heads),
            *(window, scale, blocks, section(q, streams=group)),
            **mask,
            **options,
        )
    return dq, dk, dv


def _or(x: Tensor | None, unused: Tensor) -> Tensor:
    """x, or what stands in its place where the kernel will not look."""
    return unused if x is None else x
