"""RMSNorm and LayerNorm, alone or after a residual addition, in Triton."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.gpu.launch import DTYPES, Case, launch, like, meta, multiprocessors, narrow, operator
from megalite_kernels.tiles import tile

MAX_DIM = 16384  # forward holds a row in registers
WHOLE_BYTES = 16384  # so does backward up to here, with its sums over rows; beyond, it goes by columns


@triton.jit
def _starts(row, dim, group, group_stride, row_stride, GROUPED: tl.constexpr):
    # Where rows start. Grouped: heads of a token, in a tensor that holds more heads than these.
    return (row // group) * group_stride + (row % group) * row_stride if GROUPED else row * dim


@triton.jit(do_not_specialize=["rows"])
def _norm_forward(
    x, branch, weight, bias, y, summed, mean, rstd, rows, dim, group, group_stride, row_stride, eps,
    CENTRED: tl.constexpr, HAS_BRANCH: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    place = (row * dim)[:, None] + column[None, :]
    inside = (row < rows)[:, None] & (column < dim)[None, :]
    start = _starts(row, dim, group, group_stride, row_stride, GROUPED)
    value = tl.load(x + start[:, None] + column[None, :], mask=inside, other=0.0)
    if HAS_BRANCH:
        # Rounded to the stream's dtype first: the norm is of the stream as it is stored.
        value = (value.to(tl.float32) + tl.load(branch + place, mask=inside, other=0.0)).to(value.dtype)
        tl.store(summed + place, value, mask=inside)
    value = value.to(tl.float32)
    if CENTRED:
        average = tl.sum(value, 1) / dim
        tl.store(mean + row, average, mask=row < rows)
        value = tl.where(inside, value - average[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1) / dim + narrow(eps))
    tl.store(rstd + row, scale, mask=row < rows)
    w = tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)
    result = value * scale[:, None] * w[None, :]
    if CENTRED:
        result += tl.load(bias + column, mask=column < dim, other=0.0).to(tl.float32)[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _normed(x, start, column, inside, mean, rstd, row, rows, CENTRED: tl.constexpr):
    # The normed rows before their weight, formed again from x, and their scale.
    value = tl.load(x + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    if CENTRED:
        value = tl.where(inside, value - tl.load(mean + row, mask=row < rows, other=0.0)[:, None], 0.0)
    return value * scale, scale


@triton.jit(do_not_specialize=["rows"])
def _norm_dots(
    grad, x, weight, mean, rstd, dots, rows, dim, group, group_stride, row_stride,
    CENTRED: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Σ w∘g∘n and Σ w∘g of each row, for rows too wide for backward to hold.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = _starts(row, dim, group, group_stride, row_stride, GROUPED)
    with_normed = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    alone = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in range(0, dim, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < dim)[None, :]
        g = tl.load(grad + (row * dim)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)[None, :]
        normed, _ = _normed(x, start, column, inside, mean, rstd, row, rows, CENTRED)
        with_normed += g * normed
        alone += g
    tl.store(dots + row, tl.sum(with_normed, 1), mask=row < rows)
    tl.store(dots + rows + row, tl.sum(alone, 1), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward(
    grad, grad_stream, x, weight, mean, rstd, dots, dx, dw_parts, db_parts, rows, dim, group,
    group_stride, row_stride, CENTRED: tl.constexpr, HAS_STREAM: tl.constexpr, HAS_DOTS: tl.constexpr,
    GROUPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # With n the normed row:  dw = Σ_rows g∘n;  db = Σ_rows g;
    # dx = rstd · (w∘g - n · mean(w∘g∘n) - mean(w∘g)), the last for LayerNorm alone.
    # A few programs a multiprocessor: each keeps its share of the sums over rows in registers, so they
    # have a fixed order and no atomics. The weight is read again for each row, from cache: registers
    # are what decides how many programs run.
    program, step = tl.program_id(0), tl.num_programs(0) * ROWS
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dw = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    db = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in range(program * ROWS, rows, step):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        place = (row * dim)[:, None] + column[None, :]
        inside = (row < rows)[:, None] & (column < dim)[None, :]
        start = _starts(row, dim, group, group_stride, row_stride, GROUPED)
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        normed, scale = _normed(x, start, column, inside, mean, rstd, row, rows, CENTRED)
        dw += g * normed
        if CENTRED:
            db += g
        g *= tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)[None, :]
        with_normed = tl.load(dots + row, mask=row < rows, other=0.0) if HAS_DOTS else tl.sum(g * normed, 1)
        result = g - normed * (with_normed / dim)[:, None]
        if CENTRED:
            alone = tl.load(dots + rows + row, mask=row < rows, other=0.0) if HAS_DOTS else tl.sum(g, 1)
            result -= (alone / dim)[:, None]
        result *= scale
        if HAS_STREAM:
            result += tl.load(grad_stream + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)
    part = program.to(tl.int64) * dim + column
    tl.store(dw_parts + part, tl.sum(dw, 0), mask=column < dim)
    if CENTRED:
        tl.store(db_parts + part, tl.sum(db, 0), mask=column < dim)


def _block(x: Tensor) -> int:
    block = max(triton.next_power_of_2(x.shape[-1]), 64)
    if block > MAX_DIM:
        raise ValueError(f"a row of {x.shape[-1]} does not fit; the Triton norms take up to {MAX_DIM}")
    return int(block)


def _rows_of(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """x, and how a kernel finds its rows: packed, or strided in two levels; a copy if neither.

    The q or k heads of a packed qkv projection are rows in two levels.
    """
    if x.dim() >= 2 and not x.is_contiguous() and x.stride(-1) == 1:
        outer = range(x.dim() - 3)
        if all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in outer):
            group_stride = x.stride(-3) if x.dim() > 2 else 0
            levels = {"group": x.shape[-2], "group_stride": group_stride, "row_stride": x.stride(-2)}
            return x, {**levels, "GROUPED": True}
    return x.contiguous(), {"group": 1, "group_stride": 0, "row_stride": 0, "GROUPED": False}


def _forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the stream, and each row's mean (LayerNorm's alone) and reciprocal deviation."""
    x, levels = _rows_of(x if branch is None else x.contiguous())
    rows, dim = x.numel() // x.shape[-1], x.shape[-1]
    y, rstd = like(x), _statistic(x)
    stream = x if branch is None else like(x)
    mean = rstd if bias is None else _statistic(x)
    block = _block(x)
    constants = tile("norm", f"forward/{block}", x.device)
    if rows:
        launch(
            _norm_forward,
            (triton.cdiv(rows, constants["ROWS"]),),
            *(x, x if branch is None else branch.contiguous(), weight, weight if bias is None else bias),
            *(y, stream, mean, rstd, rows, dim),
            eps=eps,
            CENTRED=bias is not None,
            HAS_BRANCH=branch is not None,
            BLOCK=block,
            **levels,
            **constants,
        )
    return y, stream, mean, rstd


def _backward(
    grad: Tensor, grad_stream: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x (and of the branch); of weight and bias the parts [programs, dim] of it.

    torch adds the parts up: they are few, and its sum has a fixed order as well.
    """
    (x, levels), grad = _rows_of(x), grad.contiguous()
    rows, dim = x.numel() // x.shape[-1], x.shape[-1]
    levels["CENTRED"] = mean is not None
    statistics = (rstd if mean is None else mean, rstd)
    block, dots = _block(x), rstd
    has_dots = block * x.element_size() > WHOLE_BYTES
    if has_dots:
        dots = rstd.new_empty(2, rows)
        constants = tile("norm", "dots", x.device)
        grid = (triton.cdiv(rows, constants["ROWS"]),)
        if rows:
            launch(_norm_dots, grid, grad, x, weight, *statistics, dots, rows, dim, **levels, **constants)
    kind = "rms_norm" if mean is None else "layer_norm"
    constants = tile("norm", f"{kind}_backward/{'columns' if has_dots else block}", x.device)
    block = constants.pop("BLOCK", block)
    programs = multiprocessors(x.device) * constants.pop("PROGRAMS")
    programs = min(programs, triton.cdiv(rows, constants["ROWS"])) or 1
    dx, dw_parts = like(x), rstd.new_empty(programs, dim)
    db_parts = dw_parts if mean is None else torch.empty_like(dw_parts)
    launch(
        _norm_backward,
        (programs, triton.cdiv(dim, block)),
        *(grad, grad if grad_stream is None else grad_stream.contiguous(), x, weight, *statistics, dots),
        *(dx, dw_parts, db_parts, rows, dim),
        HAS_STREAM=grad_stream is not None,
        HAS_DOTS=has_dots,
        BLOCK=block,
        **levels,
        **constants,
    )
    return dx, dw_parts, db_parts


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


# --- operators -------------------------------------------------------------------------------------


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = _forward(x, None, weight, None, eps)
    return y, rstd


def _add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, stream, _, rstd = _forward(x, branch, weight, None, eps)
    return y, stream, rstd


def _rms_norm_backward(
    grad: Tensor, grad_stream: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dw_parts, _ = _backward(grad, grad_stream, x, weight, None, rstd)
    return dx, dw_parts.sum(0)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = _forward(x, None, weight, bias, eps)
    return y, mean, rstd


def _add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(x, branch, weight, bias, eps)


def _layer_norm_backward(
    grad: Tensor, grad_stream: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw_parts, db_parts = _backward(grad, grad_stream, x, weight, mean, rstd)
    return dx, dw_parts.sum(0), db_parts.sum(0)


def _wide(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.float32)


rms_norm = operator("rms_norm", lambda x, weight, eps: (like(x), _statistic(x)))(_rms_norm)
layer_norm = operator("layer_norm", lambda x, weight, bias, eps: (like(x), _statistic(x), _statistic(x)))(
    _layer_norm
)
add_rms_norm = operator("add_rms_norm", lambda x, branch, weight, eps: (like(x), like(x), _statistic(x)))(
    _add_rms_norm
)
add_layer_norm = operator(
    "add_layer_norm",
    lambda x, branch, weight, bias, eps: (like(x), like(x), _statistic(x), _statistic(x)),
)(_add_layer_norm)
rms_norm_backward = operator(
    "rms_norm_backward", lambda grad, grad_stream, x, weight, rstd: (like(x), _wide(weight))
)(_rms_norm_backward)
layer_norm_backward = operator(
    "layer_norm_backward",
    lambda grad, grad_stream, x, weight, mean, rstd: (like(x), _wide(weight), _wide(weight)),
)(_layer_norm_backward)


# What backward needs of the inputs and outputs: the normed tensor, the weight, the statistics.


def _save_rms(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _save_add_rms(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], *output[1:])


def _save_add_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], inputs[2], *output[2:])


def _rms_grads(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *rms_norm_backward(grad, None, *ctx.saved_tensors), None


def _add_rms_grads(ctx: Any, grad: Tensor, grad_stream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw = rms_norm_backward(grad, grad_stream, *ctx.saved_tensors)
    return dx, dx, dw, None


def _layer_grads(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *layer_norm_backward(grad, None, *ctx.saved_tensors), None


def _add_layer_grads(ctx: Any, grad: Tensor, grad_stream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw, db = layer_norm_backward(grad, grad_stream, *ctx.saved_tensors)
    return dx, dx, dw, db, None


rms_norm.register_autograd(_rms_grads, setup_context=_save_rms)
add_rms_norm.register_autograd(_add_rms_grads, setup_context=_save_add_rms)
layer_norm.register_autograd(_layer_grads, setup_context=_save_layer)
add_layer_norm.register_autograd(_add_layer_grads, setup_context=_save_add_layer)


def cases() -> Iterator[Case]:
    """Every entry of the tile table in bf16, and fp32 where registers are short. RMSNorm's forward takes
    less of everything than LayerNorm's from the same entry."""
    widths = [2**power for power in range(6, 15)]
    for dtype, dim in (*product((torch.bfloat16,), widths), (torch.float32, 4096), (torch.float32, 16384)):
        x, weight, row = meta(8, dim, dtype=dtype), meta(dim, dtype=dtype), meta(8, dtype=torch.float32)
        name = f"{DTYPES[dtype]}/{dim}"
        yield Case(f"add_layer_norm/{name}", partial(_add_layer_norm, x, x, weight, weight, 1e-5))
        yield Case(f"rms_norm_backward/{name}", partial(_rms_norm_backward, x, x, x, weight, row))
        yield Case(f"layer_norm_backward/{name}", partial(_layer_norm_backward, x, x, x, weight, row, row))
    x, weight = meta(8, 4096, dtype=torch.bfloat16), meta(4096, dtype=torch.bfloat16)
    yield Case("add_rms_norm/bf16/4096", partial(_add_rms_norm, x, x, weight, 1e-5))
    qkv, weight = meta(8, 6, 128, dtype=torch.bfloat16), meta(128, dtype=torch.bfloat16)
    heads, row = qkv[:, :4], meta(32, dtype=torch.float32)
    yield Case("rms_norm/heads", partial(_rms_norm, heads, weight, 1e-5))
    yield Case("rms_norm_backward/heads", partial(_rms_norm_backward, heads, None, heads, weight, row))
