"""RMSNorm, alone or after a residual addition, in Triton."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.gpu.launch import DTYPES, Case, launch, meta, multiprocessors, operator
from megalite_kernels.tiles import tile

MAX_DIM = 16384  # a row is held in registers


@triton.jit
def _rms_norm_forward(
    x, branch, weight, y, stream, rstd, rows, dim, eps,
    HAS_BRANCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    place = row[:, None] * dim + column[None, :]
    inside = (row < rows)[:, None] & (column < dim)[None, :]
    value = tl.load(x + place, mask=inside, other=0.0)
    if HAS_BRANCH:
        # Rounded to the stream's dtype first: the norm is of the stream as it is stored.
        value = (value.to(tl.float32) + tl.load(branch + place, mask=inside, other=0.0)).to(value.dtype)
        tl.store(stream + place, value, mask=inside)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / dim + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    w = tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)
    result = value * scale[:, None] * w[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(
    grad, grad_stream, x, weight, rstd, dx, dw_parts, rows, dim,
    HAS_STREAM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program a multiprocessor: each keeps its share of the weight's gradient in registers, so the
    # sum has a fixed order and no atomics.
    program, step = tl.program_id(0), tl.num_programs(0) * ROWS
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(program * ROWS, rows, step):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        place = row[:, None] * dim + column[None, :]
        inside = (row < rows)[:, None] & (column < dim)[None, :]
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normed = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale
        dw += tl.sum(g * normed, 0)
        g *= w[None, :]
        result = (g - normed * (tl.sum(g * normed, 1) / dim)[:, None]) * scale
        if HAS_STREAM:
            result += tl.load(grad_stream + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)
    tl.store(dw_parts + program.to(tl.int64) * dim + column, dw, mask=column < dim)


def _constants(direction: str, x: Tensor) -> dict[str, int]:
    block = max(triton.next_power_of_2(x.shape[-1]), 64)
    if block > MAX_DIM:
        raise ValueError(f"a row of {x.shape[-1]} does not fit; the Triton norms take up to {MAX_DIM}")
    return {"BLOCK": block, **tile("norm", f"{direction}/{block}", x.device)}


def _norm_forward(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    dim = x.shape[-1]
    rows = x.numel() // dim
    constants = _constants("forward", x)
    y, rstd = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    stream = x if branch is None else torch.empty_like(x)
    launch(
        _rms_norm_forward,
        (triton.cdiv(rows, constants["ROWS"]),),
        *(x, branch if branch is not None else x, weight, y, stream, rstd, rows, dim, eps),
        HAS_BRANCH=branch is not None,
        **constants,
    )
    return y, stream, rstd


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _norm_forward(x.contiguous(), None, weight, eps)
    return y, rstd


def _add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, stream, rstd = _norm_forward(x.contiguous(), branch.contiguous(), weight, eps)
    return y, stream, rstd


def _backward(
    grad: Tensor, grad_stream: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    if grad_stream is not None:
        grad_stream = grad_stream.contiguous()
    dim = x.shape[-1]
    rows = x.numel() // dim
    constants = _constants("backward", x)
    programs = min(multiprocessors(x.device), triton.cdiv(rows, constants["ROWS"])) or 1
    dx, dw_parts = torch.empty_like(x), rstd.new_empty(programs, dim)
    launch(
        _rms_norm_backward,
        (programs,),
        *(grad, grad_stream if grad_stream is not None else grad, x, weight, rstd, dx, dw_parts, rows, dim),
        HAS_STREAM=grad_stream is not None,
        **constants,
    )
    return dx, dw_parts.sum(0)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _like(x), _rows(x)


def _add_rms_norm_fake(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(x), _rows(x)


def _backward_fake(
    grad: Tensor, grad_stream: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return _like(x), weight.new_empty(weight.shape, dtype=torch.float32)


rms_norm = operator("rms_norm", _rms_norm_fake)(_rms_norm)
add_rms_norm = operator("add_rms_norm", _add_rms_norm_fake)(_add_rms_norm)
rms_norm_backward = operator("rms_norm_backward", _backward_fake)(_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _rms_norm_autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, rstd = ctx.saved_tensors
    return *rms_norm_backward(grad, None, x, weight, rstd), None


def _save_stream(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])


def _add_rms_norm_autograd(
    ctx: Any, grad: Tensor, grad_stream: Tensor, _: Tensor
) -> tuple[Tensor, Tensor, Tensor, None]:
    stream, weight, rstd = ctx.saved_tensors
    dx, dw = rms_norm_backward(grad, grad_stream, stream, weight, rstd)
    return dx, dx, dw, None


rms_norm.register_autograd(_rms_norm_autograd, setup_context=_save)
add_rms_norm.register_autograd(_add_rms_norm_autograd, setup_context=_save_stream)


def cases() -> Iterator[Case]:
    """Every kernel that ships, for the check ahead of time."""
    for dtype, dim in product((torch.bfloat16, torch.float32), (64, 128, 1024, 2048, 4096, 8192, 16384)):
        x, weight, rstd = meta(8, dim, dtype=dtype), meta(dim, dtype=dtype), meta(8, dtype=torch.float32)
        name = f"{DTYPES[dtype]}/{dim}"
        yield Case(f"rms_norm/{name}", partial(_rms_norm, x, weight, 1e-5))
        yield Case(f"add_rms_norm/{name}", partial(_add_rms_norm, x, x, weight, 1e-5))
        yield Case(f"rms_norm_backward/{name}", partial(_backward, x, x, x, weight, rstd))
