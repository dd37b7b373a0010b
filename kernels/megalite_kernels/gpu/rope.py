"""RoPE in Triton: the heads of a packed projection in one launch, taken apart on the way."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.gpu.launch import DTYPES, Case, launch, like, meta, operator
from megalite_kernels.tiles import tile


@triton.jit
def _turn(
    source, target, cos, sin, mask, half, IS_TURNED: tl.constexpr, IS_BACKWARD: tl.constexpr
):  # fmt: skip
    # One head of some tokens: rotated by their angles, backward by the opposite ones, or copied.
    first, second = tl.load(source, mask=mask, other=0.0), tl.load(source + half, mask=mask, other=0.0)
    if IS_TURNED:
        a, b = first.to(tl.float32), second.to(tl.float32)
        if IS_BACKWARD:
            first, second = a * cos + b * sin, b * cos - a * sin
        else:
            first, second = a * cos - b * sin, b * cos + a * sin
    tl.store(target, first.to(target.dtype.element_ty), mask=mask)
    tl.store(target + half, second.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _part(
    packed, part, head, place, mask, cos, sin, batch, position, part_batch, part_token, part_head, half,
    IS_TURNED: tl.constexpr, IS_BACKWARD: tl.constexpr,
):  # fmt: skip
    # Head `head` of q, k or v: between its place in the packed projection and in a tensor of its own.
    own = part + (batch * part_batch + position * part_token + head * part_head)[:, None] + place
    if IS_BACKWARD:
        _turn(own, packed, cos, sin, mask, half, IS_TURNED, True)
    else:
        _turn(packed, own, cos, sin, mask, half, IS_TURNED, False)


@triton.jit(do_not_specialize=["tokens", "seq"])
def _rope(
    packed, q, k, v, cos, sin, tokens, seq, heads, kv_heads, half, angles_batch,
    packed_batch, packed_token, packed_head, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head,
    IS_BACKWARD: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Forward takes the packed projection apart, backward puts its gradient together. A program does
    # some heads of some tokens, whose angles it reads once.
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    batch, position = token // seq, token % seq
    place = tl.arange(0, BLOCK)[None, :]
    mask = (token < tokens)[:, None] & (place < half)
    angle = (batch * angles_batch + position * half)[:, None] + place
    c, s = tl.load(cos + angle, mask=mask, other=0.0), tl.load(sin + angle, mask=mask, other=0.0)
    token_start = (batch * packed_batch + position * packed_token)[:, None] + place
    first = tl.program_id(1) * HEADS
    for head in range(first, min(first + HEADS, heads + 2 * kv_heads)):
        there = packed + token_start + head * packed_head
        if head < heads:
            _part(there, q, head, place, mask, c, s, batch, position, q_batch, q_token, q_head,
                   half, True, IS_BACKWARD)  # fmt: skip
        elif head < heads + kv_heads:
            _part(there, k, head - heads, place, mask, c, s, batch, position, k_batch, k_token,
                  k_head, half, True, IS_BACKWARD)  # fmt: skip
        else:
            _part(there, v, head - heads - kv_heads, place, mask, c, s, batch, position, v_batch,
                  v_token, v_head, half, False, IS_BACKWARD)  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """x with heads that are contiguous, copied only if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(
    packed: Tensor, parts: tuple[Tensor, ...], cos: Tensor, sin: Tensor, *, kv_heads: int, is_backward: bool
) -> None:
    batch, seq, total, dim = packed.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    block = max(triton.next_power_of_2(int(dim) // 2), 16)  # while torch traces, dim may be a symbol
    constants = tile("rope", f"{block}", packed.device)
    if not packed.numel():
        return
    launch(
        _rope,
        (triton.cdiv(batch * seq, constants["TOKENS"]), triton.cdiv(total, constants["HEADS"])),
        *(packed, *parts, cos, sin, batch * seq, seq, total - 2 * kv_heads, kv_heads, dim // 2),
        *(0 if cos.shape[0] == 1 else cos.stride(0), *packed.stride()[:3]),
        *(stride for part in parts for stride in part.stride()[:3]),
        IS_BACKWARD=is_backward,
        BLOCK=block,
        **constants,
    )


def _rope_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    qkv, parts = _rows(qkv), _rope_qkv_fake(qkv, cos, sin, heads, kv_heads)
    _launch(qkv, parts, cos, sin, kv_heads=kv_heads, is_backward=False)
    return parts


def _rope_qkv_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    parts = (_rows(dq), _rows(dk), _rows(dv))
    d_qkv = _rope_qkv_backward_fake(dq, dk, dv, cos, sin)
    _launch(d_qkv, parts, cos, sin, kv_heads=dk.shape[2], is_backward=True)
    return d_qkv


def _rope_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, y = _rows(x), like(x)
    _launch(x, (y, y, y), cos, sin, kv_heads=0, is_backward=False)
    return y


def _rope_one_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dy, dx = _rows(dy), like(dy)
    _launch(dx, (dy, dy, dy), cos, sin, kv_heads=0, is_backward=True)
    return dx


def _rope_qkv_fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, seq, _, dim = qkv.shape
    q, k, v = (qkv.new_empty(batch, seq, count, dim) for count in (heads, kv_heads, kv_heads))
    return q, k, v


def _rope_qkv_backward_fake(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, seq, heads, dim = dq.shape
    return dq.new_empty(batch, seq, heads + 2 * dk.shape[2], dim)


rope_qkv = operator("rope_qkv", _rope_qkv_fake)(_rope_qkv)
rope_qkv_backward = operator("rope_qkv_backward", _rope_qkv_backward_fake)(_rope_qkv_backward)
rope = operator("rope", lambda x, cos, sin: like(x))(_rope_one)
rope_backward = operator("rope_backward", lambda dy, cos, sin: like(dy))(_rope_one_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _rope_qkv_grads(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    return rope_qkv_backward(dq, dk, dv, *ctx.saved_tensors), None, None, None, None


def _rope_grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return rope_backward(dy, *ctx.saved_tensors), None, None


rope_qkv.register_autograd(_rope_qkv_grads, setup_context=_save)
rope.register_autograd(_rope_grads, setup_context=_save)


def cases() -> Iterator[Case]:
    """Both directions of a packed projection, for every head size of the tile table."""
    for dim in (32, 64, 128, 256):
        qkv, angles = meta(2, 8, 12, dim, dtype=torch.bfloat16), meta(1, 8, dim // 2, dtype=torch.float32)
        q, k = qkv[:, :, :8].contiguous(), qkv[:, :, :2].contiguous()
        name = f"{DTYPES[qkv.dtype]}/{dim}"
        yield Case(f"rope_qkv/{name}", partial(_rope_qkv, qkv, angles, angles, 8, 2))
        yield Case(f"rope_qkv_backward/{name}", partial(_rope_qkv_backward, q, k, k, angles, angles))
