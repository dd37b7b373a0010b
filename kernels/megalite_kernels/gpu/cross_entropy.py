"""Cross-entropy in place in Triton: a program has a row, and goes over it in blocks, twice.

The second time it finds much of the row in the L2 cache. With a vocabulary divided among ranks the two
passes are two kernels, with the exchange of the rows' statistics between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.gpu.launch import DTYPES, Case, launch, meta, narrow, operator
from megalite_kernels.tiles import tile

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_IGNORE = tl.constexpr(-100)


@triton.jit
def _read_row(row, vocab, SMOOTHS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit, Σ exp(logit - largest) and, for label smoothing, Σ logit."""
    column = tl.arange(0, BLOCK)
    largest = tl.full((), -3.0e38, tl.float32)  # finite, for a block of nothing but -inf
    total = tl.full((), 0.0, tl.float32)
    plain = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        inside = start + column < vocab
        value = tl.load(row + start + column, mask=inside, other=-float("inf")).to(tl.float32)
        raised = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp2((largest - raised) * _LOG2E) + tl.sum(tl.exp2((value - raised) * _LOG2E), 0)
        largest = raised
        if SMOOTHS:
            plain += tl.sum(tl.where(inside, value, 0.0), 0)
    return largest, total, plain


@triton.jit
def _row_statistics(
    logits, targets, statistics, stride, vocab, first_id, SMOOTHS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * stride
    local = tl.load(targets + number) - first_id
    is_mine = (local >= 0) & (local < vocab)
    target_logit = tl.load(row + local, mask=is_mine, other=0.0).to(tl.float32)
    largest, total, plain = _read_row(row, vocab, SMOOTHS, BLOCK)
    out = statistics + number * (3 if SMOOTHS else 2)
    tl.store(out, largest + tl.log2(total) * _LN2)
    tl.store(out + 1, target_logit)
    if SMOOTHS:
        tl.store(out + 2, plain)


@triton.jit
def _cross_entropy(
    logits, targets, statistics, losses, stride, vocab, first_id, vocab_size, z_loss, smoothing,
    HAS_STATISTICS: tl.constexpr, SMOOTHS: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * stride
    target = tl.load(targets + number)
    local = target - first_id
    if HAS_STATISTICS:
        whole = statistics + number * (3 if SMOOTHS else 2)
        lse = tl.load(whole)
        target_logit = tl.load(whole + 1)
        plain = tl.load(whole + 2) if SMOOTHS else 0.0
        shift, scale = lse, 1.0
    else:
        # Read before anything is written, and all threads meet in the sums of `_read_row`.
        is_mine = (local >= 0) & (local < vocab)
        target_logit = tl.load(row + local, mask=is_mine, other=0.0).to(tl.float32)
        shift, total, plain = _read_row(row, vocab, SMOOTHS, BLOCK)
        lse = shift + tl.log2(total) * _LN2
        scale = 1.0 / total
    is_asked = target != _IGNORE
    target_logit = tl.where((target >= 0) & (target < vocab_size), target_logit, float("nan"))
    z_loss, smoothing = narrow(z_loss), narrow(smoothing)
    z = z_loss * lse * lse
    loss = lse - (1.0 - smoothing) * target_logit + z
    if SMOOTHS:
        loss -= smoothing * (plain / vocab_size)
    tl.store(losses + 2 * number, tl.where(is_asked, loss, 0.0))
    tl.store(losses + 2 * number + 1, tl.where(is_asked, z, 0.0))
    if WRITES:
        factor = tl.where(is_asked, 1.0 + 2.0 * z_loss * lse, 0.0) * scale
        peak = tl.where(is_asked, 1.0 - smoothing, 0.0)
        even = tl.where(is_asked, smoothing / vocab_size, 0.0)
        column = tl.arange(0, BLOCK)
        for start in range(0, vocab, BLOCK):
            place = start + column
            value = tl.load(row + place, mask=place < vocab, other=0.0).to(tl.float32)
            gradient = tl.exp2((value - shift) * _LOG2E) * factor
            if SMOOTHS:
                gradient -= even
            gradient = tl.where(place == local, gradient - peak, gradient)
            tl.store(row + place, gradient.to(logits.dtype.element_ty), mask=place < vocab)


def _statistics(logits: Tensor, targets: Tensor, first_id: int, smooths: bool) -> Tensor:
    found = logits.new_empty(logits.shape[0], 3 if smooths else 2, dtype=torch.float32)
    if logits.shape[0]:
        launch(
            _row_statistics,
            (logits.shape[0],),
            *(logits, targets.contiguous(), found, logits.stride(0), logits.shape[1], first_id),
            SMOOTHS=smooths,
            **tile("cross_entropy", DTYPES[logits.dtype], logits.device),
        )
    return found


def _loss(
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor | None,
    first_id: int,
    vocab_size: int,
    z_loss: float,
    label_smoothing: float,
    writes: bool,
) -> Tensor:
    rows, vocab = logits.shape
    losses = logits.new_empty(rows, 2, dtype=torch.float32)
    if rows:
        whole = losses if statistics is None else statistics.contiguous()
        launch(
            _cross_entropy,
            (rows,),
            *(logits, targets.contiguous(), whole, losses, logits.stride(0), vocab, first_id, vocab_size),
            *(z_loss, label_smoothing),
            HAS_STATISTICS=statistics is not None,
            SMOOTHS=label_smoothing != 0,
            WRITES=writes,
            **tile("cross_entropy", DTYPES[logits.dtype], logits.device),
        )
    return losses.sum(0)


def _statistics_fake(logits: Tensor, targets: Tensor, first_id: int, smooths: bool) -> Tensor:
    return logits.new_empty(logits.shape[0], 3 if smooths else 2, dtype=torch.float32)


def _loss_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(2, dtype=torch.float32)


statistics = operator("cross_entropy_statistics", _statistics_fake)(_statistics)
loss = operator("cross_entropy", _loss_fake, mutates_args=("logits",))(_loss)


def cases() -> Iterator[Case]:
    """Every kernel that ships, for the check ahead of time."""
    targets, whole = meta(8, dtype=torch.int64), meta(8, 3, dtype=torch.float32)
    for dtype, vocab in ((torch.bfloat16, 128256), (torch.float16, 50257), (torch.float32, 50257)):
        logits = meta(8, vocab, dtype=dtype)
        ends = (0, vocab, 1e-4)
        name = f"{DTYPES[dtype]}/{vocab}"
        yield Case(f"cross_entropy/{name}", partial(_loss, logits, targets, None, *ends, 0.0, True))
        if dtype == torch.bfloat16:
            yield Case(f"smoothed/{name}", partial(_loss, logits, targets, None, *ends, 0.1, True))
            yield Case(f"without gradient/{name}", partial(_loss, logits, targets, None, *ends, 0.0, False))
            yield Case(f"statistics/{name}", partial(_statistics, logits, targets, 0, True))
            yield Case(f"of a shard/{name}", partial(_loss, logits, targets, whole, *ends, 0.1, True))
