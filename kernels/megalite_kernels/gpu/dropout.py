"""Dropout in Triton, with the numbers of `counter` drawn in registers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.gpu.launch import DTYPES, Case, launch, like, meta, operator
from megalite_kernels.tiles import tile

# SplitMix64's constants, as in `counter`.
_GOLDEN = tl.constexpr(-7046029254386353131)
_FIRST = tl.constexpr(-4658895280553007687)
_SECOND = tl.constexpr(-7723592293110705685)


@triton.jit
def _shift_right(z, BITS: tl.constexpr):
    return (z.to(tl.uint64, bitcast=True) >> BITS).to(tl.int64, bitcast=True)


@triton.jit
def _dropout(
    x, keys, places, y, width, share,
    THRESHOLD: tl.constexpr, HAS_PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    index = column
    if HAS_PLACES:
        index += tl.load(places + row) * width
    z = tl.load(keys + row) + index * _GOLDEN
    z = (z ^ _shift_right(z, 30)) * _FIRST
    z = (z ^ _shift_right(z, 27)) * _SECOND
    z = z ^ _shift_right(z, 31)
    # Rounded to the dtype as a mask in that dtype would be.
    scale = tl.div_rn(tl.full((1,), 1.0, tl.float32), tl.full((1,), share, tl.float32))
    scale = scale.to(x.dtype.element_ty).to(tl.float32)
    value = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    value *= tl.where(_shift_right(z, 12) >= THRESHOLD, scale, 0.0)
    tl.store(y + row * width + column, value.to(y.dtype.element_ty), mask=column < width)


def _launch(x: Tensor, p: float, keys: Tensor, places: Tensor | None) -> Tensor:
    x, keys = x.contiguous(), keys.contiguous()
    y = torch.empty_like(x)
    rows, width = x.shape[0], math.prod(x.shape[1:])
    if not x.numel():
        return y
    constants = tile("dropout", "row", x.device)
    # (bits + 1/2) / 2⁵² >= p, which is exact in float64, as a bound on the bits. A constant of the kernel:
    # torch 2.11 compiles none with a number beyond 32 bits.
    threshold = math.ceil(Fraction(p) * 2**52 - Fraction(1, 2))
    launch(
        _dropout,
        (rows, triton.cdiv(width, constants["BLOCK"])),
        *(x, keys, keys if places is None else places.contiguous(), y, width, 1 - p),
        THRESHOLD=threshold,
        HAS_PLACES=places is not None,
        **constants,
    )
    return y


def _fake(x: Tensor, p: float, keys: Tensor, places: Tensor | None) -> Tensor:
    return like(x)


dropout = operator("dropout", _fake)(_launch)


def cases() -> Iterator[Case]:
    """Every kernel that ships, for the check ahead of time."""
    keys = meta(8, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        yield Case(f"row/{DTYPES[dtype]}", partial(_launch, meta(8, 4096, dtype=dtype), 0.1, keys, keys))
