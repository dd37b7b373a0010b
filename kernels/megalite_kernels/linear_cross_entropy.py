"""Output projection and cross-entropy in one, in chunks of tokens.

The logits of one chunk exist at a time, and their gradient is formed in the forward pass (6·T·d·V
operations instead of the 8·T·d·V that computing the logits again would take), so a vocabulary of
any size costs one chunk of memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalite_kernels.cost import Cost
from megalite_kernels.cross_entropy import (
    Terms,
    VocabShard,
    cross_entropy_reference,
    replace_by_gradient,
    scale_owned,
)
from megalite_kernels.dispatch import Impl, Resolved, resolve

# Each chunk reads and writes the whole fp32 weight gradient, which on a GPU takes thousands of rows to
# hide behind the products. On CPU a few hundred do, and a chunk that stays in the last cache is faster.
_CHUNK_BYTES = {"cuda": 2**30, "cpu": 2**24}
_ROWS = 256  # chunks are multiples of it where they have as many: whole tiles for the products


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_bytes: int | None = None,
    vocab_shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`cross_entropy_` of `x @ weightᵀ`, with `chunk_bytes` of logits existing at once.

    By default that is 1 GiB on a GPU and 16 MiB on CPU; a chunk is one row at least.

    With a `vocab_shard`, `weight` is one rank's rows, every rank gets the same loss, the weight's
    gradient is that of its rows, and x's gradient is a rank's share, to be summed over the ranks.
    `chunk_bytes` is then of all ranks together.

    Shapes:  x [tokens, hidden]; weight [vocab, hidden]; targets [tokens] int64; returns loss and z part,
             0-dim in at least fp32. The weight's gradient leaves in at least fp32, unrounded
    Raises:  as `cross_entropy_`
    """
    chosen = resolve(impl, "cross_entropy", x)
    terms = Terms(z_loss, label_smoothing)
    if chosen == "reference" and vocab_shard is None:
        return cross_entropy_reference(x @ weight.t(), targets, terms)
    wants = tuple(torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    if chunk_bytes is None:
        chunk_bytes = _CHUNK_BYTES["cuda" if x.is_cuda else "cpu"]
    # Of the whole vocabulary, since all ranks must exchange as often.
    vocab = weight.shape[0] if vocab_shard is None else vocab_shard.vocab_size
    rows = _chunk_rows(vocab * weight.element_size(), chunk_bytes)
    loss, z = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x, weight, targets, terms, rows, vocab_shard, wants, chosen
    )
    return loss, z


def cost(tokens: int, hidden: int, vocab: int, element_bytes: int) -> Cost:
    """Loss and both gradients: three products; x, weight and dx once, dw in fp32, no logits."""
    ends = (2 * tokens + vocab) * hidden * element_bytes + 4 * vocab * hidden + 8 * tokens
    return Cost(6 * tokens * hidden * vocab, ends)


def _chunk_rows(row_bytes: int, chunk_bytes: int) -> int:
    rows = chunk_bytes // row_bytes
    return rows // _ROWS * _ROWS if rows >= _ROWS else max(rows, 1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        terms: Terms,
        chunk_rows: int,
        shard: VocabShard | None,
        wants: tuple[bool, bool],
        chosen: Resolved,
    ) -> tuple[Tensor, Tensor]:
        sums, dx, dw = _chunked(x, weight, targets, terms, chunk_rows, shard, wants, chosen)
        ctx.save_for_backward(dx, dw)
        loss, z = sums.unbind()
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = (None if g is None else scale_owned(g, grads[0]) for g in ctx.saved_tensors)
        return dx, dw, None, None, None, None, None, None


def _chunked(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    terms: Terms,
    chunk_rows: int,
    shard: VocabShard | None,
    wants: tuple[bool, bool],
    chosen: Resolved,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[loss, z part], and as far as wanted dx in x's dtype and dw in at least fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = x.new_zeros(2, dtype=wide)
    dx = torch.empty_like(x) if wants[0] else None
    dw = torch.empty_like(weight, dtype=wide) if wants[1] else None
    if dw is not None and not x.shape[0]:
        dw.zero_()
    # One buffer serves every chunk: fresh memory for each would cost more in page faults than the
    # softmax in arithmetic.
    buffer = x.new_empty(min(chunk_rows, x.shape[0]), weight.shape[0])
    for start in range(0, x.shape[0], chunk_rows):
        chunk = slice(start, start + chunk_rows)
        rows = x[chunk]
        logits = torch.mm(rows, weight.t(), out=buffer[: rows.shape[0]])
        sums += replace_by_gradient(logits, targets[chunk], terms, shard, any(wants), chosen)
        if dx is not None:
            torch.mm(logits, weight, out=dx[chunk])
        if dw is not None:
            _add_product(dw, logits.t(), rows, is_first=start == 0)
    return sums, dx, dw


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """total += a @ b, or total = a @ b at first, without a rounding to a's dtype where torch can."""
    beta = 0 if is_first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda and not torch.compiler.is_compiling():
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    elif a.is_cuda:  # torch 2.11 has no shapes for the call above
        product = torch.mm(a, b, out_dtype=total.dtype)
        total.copy_(product if is_first else total + product)
    elif is_first:
        total.copy_(a @ b)
    else:  # in pieces, for torch first makes an fp32 copy of what it adds to fp32
        for rows, product in zip(torch.split(total, _ROWS), torch.split(a @ b, _ROWS), strict=True):
            rows += product
