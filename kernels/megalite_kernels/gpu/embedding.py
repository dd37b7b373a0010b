"""The embedding's gradient in Triton: equal ids are brought together by a sort, and their rows added up.

A program adds up one chunk of the sorted tokens, so a token that is everywhere costs no more than others.
A run of equal ids within a chunk is written to the table. Of one that crosses into other chunks each keeps
its part, and a second kernel adds these up where the run began. Every sum has one order: no atomics.
"""

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
def _add_runs(
    grad, ids, order, table, heads, tails, tokens, dim, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    start = chunk * CHUNK
    total = tl.zeros([BLOCK], dtype=tl.float32)
    row = tl.load(ids + start)
    # Whether the run began in a chunk before this one.
    is_head = tl.load(ids + start - 1, mask=start > 0, other=-2) == row
    for step in range(CHUNK):
        place = start + step
        following = tl.load(ids + place + 1, mask=place + 1 < tokens, other=-2)
        is_mine = (row >= 0) & (place < tokens)
        source = tl.load(order + place, mask=is_mine, other=0)
        # A condition of all lanes is put into the bound: Triton 3.9's interpreter takes no mask made of a
        # block and a scalar.
        width = tl.where(is_mine, dim, 0)
        total += tl.load(grad + source * dim + column, mask=column < width, other=0.0).to(tl.float32)
        ends = following != row
        if is_mine & (ends | (step == CHUNK - 1)):
            edge = tl.where(is_head, heads, tails) + chunk * dim
            target = tl.where(ends & (is_head == 0), table + row * dim, edge)
            tl.store(target + column, total, mask=inside)
        total = tl.where(ends, 0.0, total)
        is_head = is_head & (following == row)
        row = following


@triton.jit
def _join_runs(
    ids, stops, table, heads, tails, tokens, dim,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    start = chunk * CHUNK
    end = start + CHUNK
    row = tl.load(ids + end - 1, mask=end < tokens, other=-1)
    goes_on = tl.load(ids + end, mask=end < tokens, other=-2) == row
    began_before = tl.load(ids + start - 1, mask=start > 0, other=-2) == row
    if (row >= 0) & goes_on & (began_before == 0):
        total = tl.load(tails + chunk * dim + column, mask=inside, other=0.0)
        last = (tl.load(stops + chunk) + CHUNK - 1) // CHUNK
        for first in range(chunk + 1, last, ROWS):
            part = first + tl.arange(0, ROWS).to(tl.int64)
            place = part[:, None] * dim + column[None, :]
            total += tl.sum(
                tl.load(heads + place, mask=(part < last)[:, None] & inside[None, :], other=0.0), 0
            )
        tl.store(table + row * dim + column, total, mask=inside)


def _backward(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    dim = grad.shape[-1]
    table = grad.new_zeros(rows, dim, dtype=torch.float32)
    tokens = ids.numel()
    if not tokens:
        return table
    grad = grad.contiguous()
    ordered, order = ids.flatten().sort(stable=True)
    adds, joins = (tile("embedding", kernel, grad.device) for kernel in ("add", "join"))
    chunk = adds["CHUNK"]
    chunks = triton.cdiv(tokens, chunk)
    heads, tails = (grad.new_empty(chunks, dim, dtype=torch.float32) for _ in range(2))
    grid = (chunks, triton.cdiv(dim, adds["BLOCK"]))
    launch(_add_runs, grid, grad, ordered, order, table, heads, tails, tokens, dim, **adds)
    # Where the run of each chunk's last id ends.
    lasts = ordered[chunk - 1 :: chunk].contiguous()
    stops = torch.searchsorted(ordered, lasts, right=True)
    grid = (lasts.numel(), triton.cdiv(dim, joins["BLOCK"]))
    if lasts.numel():
        launch(_join_runs, grid, ordered, stops, table, heads, tails, tokens, dim, CHUNK=chunk, **joins)
    return table


def _backward_fake(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[-1], dtype=torch.float32)


embedding_backward = operator("embedding_backward", _backward_fake)(_backward)


def cases() -> Iterator[Case]:
    """Every kernel that ships, for the check ahead of time."""
    ids = meta(4096, dtype=torch.int64)
    for dtype, dim in ((torch.bfloat16, 4096), (torch.float32, 1000)):
        name = f"backward/{DTYPES[dtype]}/{dim}"
        yield Case(name, partial(_backward, meta(4096, dim, dtype=dtype), ids, 32000))
