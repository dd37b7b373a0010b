"""The sum of squares in Triton, in two stages: each program a fixed run of elements, torch the rest."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.gpu.launch import DTYPES, Case, launch, meta, operator
from megalite_kernels.tiles import tile


@triton.jit
def _partial_sums(x, sums, size, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(STEPS):
        place = start + step * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + place, mask=place < size, other=0.0).to(tl.float32)
        total += value * value
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def _launch(x: Tensor) -> Tensor:
    constants = tile("sum_of_squares", "run", x.device)
    programs = triton.cdiv(x.numel(), constants["STEPS"] * constants["BLOCK"])
    sums = x.new_empty(programs, dtype=torch.float32)
    if programs:
        launch(_partial_sums, (programs,), x.contiguous(), sums, x.numel(), **constants)
    return sums


def _fake(x: Tensor) -> Tensor:
    constants = tile("sum_of_squares", "run", x.device)
    return x.new_empty(triton.cdiv(x.numel(), constants["STEPS"] * constants["BLOCK"]), dtype=torch.float32)


partial_sums = operator("partial_sums_of_squares", _fake)(_launch)


def cases() -> Iterator[Case]:
    """Every kernel that ships, for the check ahead of time."""
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(f"run/{DTYPES[dtype]}", partial(_launch, meta(1 << 20, dtype=dtype)))
