"""The MLP's two GEMMs that carry an activation in their epilogue, in Triton."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.gpu.activation import activate, activate_backward
from megalite_kernels.gpu.launch import DTYPES, Case, launch, like, meta, operator
from megalite_kernels.tiles import tile


@triton.jit
def _tile_of(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    # Programs go down GROUP tiles before they go right, so that those that run together share what
    # they read in the L2 cache.
    program = tl.program_id(0)
    down, right = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = program // (GROUP * right) * GROUP
    height = min(down - first, GROUP)
    within = program % (GROUP * right)
    return first + within % height, within // height


@triton.jit
def _quarters(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # x by quarters of its columns. Epilogues go by them: a whole tile beside what it is combined with
    # and what it becomes does not fit into registers.
    left, right = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
    part0, part1 = tl.split(tl.permute(tl.reshape(left, (ROWS, 2, COLUMNS // 4)), (0, 2, 1)))
    part2, part3 = tl.split(tl.permute(tl.reshape(right, (ROWS, 2, COLUMNS // 4)), (0, 2, 1)))
    return part0, part1, part2, part3


@triton.jit
def _finish_forward(
    value, up, bias, pre, hidden, row, column, tokens, ffn,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    gated: tl.constexpr = ACTIVATION == "swiglu"
    if HAS_BIAS:
        value += tl.load(bias + column, mask=column < ffn, other=0.0).to(tl.float32)[None, :]
        if gated:
            up += tl.load(bias + ffn + column, mask=column < ffn, other=0.0).to(tl.float32)[None, :]
    # The activation is of the pre-activation as it is stored: backward will see no other.
    value, up = value.to(pre.dtype.element_ty), up.to(pre.dtype.element_ty)
    inside = (row < tokens)[:, None] & (column < ffn)[None, :]
    place = row[:, None] * (2 * ffn if gated else ffn) + column[None, :]
    tl.store(pre + place, value, mask=inside)
    if gated:
        tl.store(pre + place + ffn, up, mask=inside)
    result = activate(value, up, ACTIVATION)
    tl.store(hidden + row[:, None] * ffn + column[None, :], result.to(hidden.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _linear_activation(
    x, weight, bias, pre, hidden, tokens, ffn, size,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # hidden's tile, for SwiGLU from a gate and an up tile of the same columns.
    gated: tl.constexpr = ACTIVATION == "swiglu"
    down, right = _tile_of(tokens, ffn, BLOCK_M, BLOCK_N, GROUP)
    row = down.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = right.to(tl.int64) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    from_x = x + row[:, None] * size + k[None, :]
    from_weight = weight + column[None, :] * size + k[:, None]
    up_rows = tl.cast(size, tl.int64) * ffn
    is_row, is_column = (row < tokens)[:, None], (column < ffn)[None, :]
    value = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, size, BLOCK_K):
        left = size - start
        a = tl.load(from_x, mask=is_row & (k < left)[None, :], other=0.0)
        mask = is_column & (k < left)[:, None]
        value = tl.dot(a, tl.load(from_weight, mask=mask, other=0.0), value, input_precision=PRECISION)
        if gated:
            b = tl.load(from_weight + up_rows, mask=mask, other=0.0)
            up = tl.dot(a, b, up, input_precision=PRECISION)
        from_x += BLOCK_K
        from_weight += BLOCK_K
    quarter: tl.constexpr = BLOCK_N // 4
    parts = _quarters(value, BLOCK_M, BLOCK_N)
    up_parts = _quarters(up, BLOCK_M, BLOCK_N) if gated else parts
    for i in tl.static_range(4):
        own = first + i * quarter + tl.arange(0, quarter)
        _finish_forward(parts[i], up_parts[i], bias, pre, hidden, row, own, tokens, ffn, ACTIVATION, HAS_BIAS)


@triton.jit
def _finish_backward(
    d_hidden, pre, d_pre, hidden, row, column, tokens, ffn, ACTIVATION: tl.constexpr
):  # fmt: skip
    # Gradient of the pre-activation and hidden for one sub-tile of d_hidden.
    gated: tl.constexpr = ACTIVATION == "swiglu"
    inside = (row < tokens)[:, None] & (column < ffn)[None, :]
    place = row[:, None] * (2 * ffn if gated else ffn) + column[None, :]
    value = tl.load(pre + place, mask=inside, other=0.0)
    up = tl.load(pre + place + ffn, mask=inside, other=0.0) if gated else value
    d_value, d_up, again = activate_backward(d_hidden, value, up, ACTIVATION)
    tl.store(d_pre + place, d_value.to(d_pre.dtype.element_ty), mask=inside)
    if gated:
        tl.store(d_pre + place + ffn, d_up.to(d_pre.dtype.element_ty), mask=inside)
    tl.store(hidden + row[:, None] * ffn + column[None, :], again.to(hidden.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _activation_gradient(
    dy, weight, pre, d_pre, hidden, tokens, ffn, size,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    down, right = _tile_of(tokens, ffn, BLOCK_M, BLOCK_N, GROUP)
    row = down.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = right.to(tl.int64) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    from_dy = dy + row[:, None] * size + k[None, :]
    from_weight = weight + column[None, :] * size + k[:, None]
    d_hidden = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, size, BLOCK_K):
        left = size - start
        a = tl.load(from_dy, mask=(row < tokens)[:, None] & (k < left)[None, :], other=0.0)
        b = tl.load(from_weight, mask=(column < ffn)[None, :] & (k < left)[:, None], other=0.0)
        d_hidden = tl.dot(a, b, d_hidden, input_precision=PRECISION)
        from_dy += BLOCK_K
        from_weight += BLOCK_K
    quarter: tl.constexpr = BLOCK_N // 4
    parts = _quarters(d_hidden, BLOCK_M, BLOCK_N)
    for i in tl.static_range(4):
        own = first + i * quarter + tl.arange(0, quarter)
        _finish_backward(parts[i], pre, d_pre, hidden, row, own, tokens, ffn, ACTIVATION)


def _parts(activation: str) -> int:
    return 2 if activation == "swiglu" else 1


def _constants(kernel: str, x: Tensor, activation: str) -> dict[str, Any]:
    kind = "fp32" if x.dtype == torch.float32 else "16bit"
    shape = "gated" if activation == "swiglu" else "plain"
    constants: dict[str, Any] = tile("mlp", f"{kernel}/{shape}/{kind}", x.device)
    return {"ACTIVATION": activation, "PRECISION": "ieee" if kind == "fp32" else "tf32", **constants}


def _grid(constants: dict[str, Any], tokens: int, ffn: int) -> tuple[int]:
    return (triton.cdiv(tokens, constants["BLOCK_M"]) * triton.cdiv(ffn, constants["BLOCK_N"]),)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, activation: str) -> Tensor:
    # The hidden layer is an argument, not a second output: who keeps this operator's outputs, as selective
    # recompute does, keeps what backward reads and no more.
    x, weight = x.contiguous(), weight.contiguous()
    (tokens, size), ffn = x.shape, hidden.shape[1]
    pre = x.new_empty(tokens, weight.shape[0])
    constants = _constants("linear_activation", x, activation)
    if tokens:
        launch(
            _linear_activation,
            _grid(constants, tokens, ffn),
            *(x, weight, x if bias is None else bias.contiguous(), pre, hidden, tokens, ffn, size),
            HAS_BIAS=bias is not None,
            **constants,
        )
    return pre


def _backward(dy: Tensor, weight: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dy, weight, pre = dy.contiguous(), weight.contiguous(), pre.contiguous()
    (tokens, size), ffn = dy.shape, weight.shape[0]
    d_pre, hidden = torch.empty_like(pre), dy.new_empty(tokens, ffn)
    constants = _constants("activation_backward", dy, activation)
    if tokens:
        grid = _grid(constants, tokens, ffn)
        launch(_activation_gradient, grid, dy, weight, pre, d_pre, hidden, tokens, ffn, size, **constants)
    return d_pre, hidden


def _forward_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _backward_fake(dy: Tensor, weight: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return like(pre), dy.new_empty(dy.shape[0], weight.shape[0])


linear_activation = operator("linear_activation", _forward_fake, ("hidden",))(_forward)
activation_backward = operator("linear_activation_backward", _backward_fake)(_backward)


def cases() -> Iterator[Case]:
    """Every entry of the tile table, in bf16 or fp32; the GELUs share theirs."""
    for dtype, name in (
        *((torch.bfloat16, name) for name in ("swiglu", "gelu", "gelu_tanh")),
        *((torch.float32, name) for name in ("swiglu", "gelu")),
    ):
        x, pre = meta(8, 512, dtype=dtype), meta(8, 1024 * _parts(name), dtype=dtype)
        up, down = meta(1024 * _parts(name), 512, dtype=dtype), meta(1024, 512, dtype=dtype)
        bias, hidden = meta(up.shape[0], dtype=dtype), meta(8, 1024, dtype=dtype)
        yield Case(f"linear_activation/{name}/{DTYPES[dtype]}", partial(_forward, x, up, bias, hidden, name))
        yield Case(f"activation_backward/{name}/{DTYPES[dtype]}", partial(_backward, x, down, pre, name))
