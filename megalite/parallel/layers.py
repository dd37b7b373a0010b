"""Tensor-parallel layers and what moves activations between them (Megatron's f and g).

Between two parallel layers the residual stream is whole on every rank, or, with sequence parallelism,
each rank holds its share of the tokens, a contiguous run of rows: norms, dropout and residual sums are
then divided as well, and the all-reduce becomes a reduce-scatter and an all-gather of the same bytes.
With one rank on the axis each layer is the plain one.

Source:  Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.parallel.collectives import all_reduce, start_all_gather, start_all_reduce, start_reduce_scatter
from megalite.parallel.deferred import WeightGradients, current_gradients, deferred_leaf, linear
from megalite.parallel.mesh import ALONE, Axis
from megalite.parallel.sharding import Piece, ShardedModule, ShardSpec, split, split_range, whole
from megalite.parallel.uncompiled import uncompiled
from megalite_kernels import VocabShard, embedding


@dataclass(frozen=True)
class TensorParallel:
    """How layers are divided: over `axis`, with the token stream divided too if `sequence`.

    `kv` is the part of the axis whose ranks hold the same key and value heads.
    """

    axis: Axis = ALONE
    kv: Axis = ALONE
    sequence: bool = False

    @property
    def divides_tokens(self) -> bool:
        """Whether a rank holds only its share of the tokens between two layers."""
        return self.sequence and self.axis.size > 1

    def replicated(self, shape: tuple[int, ...]) -> ShardSpec:
        """A parameter of the residual stream: whole on every rank, its gradient in shares if tokens are."""
        return whole(shape, self.axis, is_partial=self.divides_tokens)

    def token_shard(self, rows: Tensor) -> Tensor:
        """This rank's share of [tokens, ...] rows that every rank holds."""
        if not self.divides_tokens:
            return rows
        start, stop = split_range(rows.shape[0], self.axis)
        return rows[start:stop]


class ColumnParallelLinear(ShardedModule):
    """y = x Wᵀ + b with the rows of W, the output features, divided over the axis."""

    def __init__(self, tp: TensorParallel, weight: ShardSpec, bias: ShardSpec | None) -> None:
        super().__init__()
        self.tp = tp
        self.weight = self.declare("weight", weight)
        self.bias = None if bias is None else self.declare("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the whole stream by this rank's rows.

        Shapes:  x [tokens, in], or [tokens/tp, in] if tokens are divided; returns [tokens, out/tp]
        Comm:    backward an all-reduce of tokens·in elements while the weight's gradient is computed; if
                 tokens are divided an all-gather forward, and backward an all-gather and a
                 reduce-scatter, each while a product is computed
        """
        if self.tp.axis.size == 1:
            return linear(x, self.weight, self.bias)
        y: Tensor = _column_parallel(x, self.weight, self.bias, self.tp)
        return y


class RowParallelLinear(ShardedModule):
    """y = Σ_tp x W + b with the rows of W [in, out], the input features, divided over the axis."""

    def __init__(self, tp: TensorParallel, shape: tuple[int, int], has_bias: bool) -> None:
        super().__init__()
        self.tp = tp
        self.weight = self.declare("weight", split(shape, tp.axis))
        self.bias = self.declare("bias", tp.replicated(shape[1:])) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply this rank's features and sum over the axis.

        Shapes:  x [tokens, in/tp]; returns [tokens, out], or [tokens/tp, out] if tokens are divided
        Comm:    forward one all-reduce of tokens·out elements, or, if tokens are divided, a
                 reduce-scatter, and an all-gather backward
        """
        if self.tp.axis.size == 1:
            return linear(x, self.weight, self.bias, is_transposed=True)
        y: Tensor = reduce_from_tp(linear(x, self.weight, is_transposed=True), self.tp)
        return y if self.bias is None else y + self.bias


def vocab_parallel_embedding(ids: Tensor, weight: Tensor, first_id: int, tp: TensorParallel) -> Tensor:
    """Look up tokens in a table whose rows, the vocabulary, are divided over the axis.

    Shapes:  ids [tokens]; weight this rank's rows, from `first_id` on; returns [tokens, hidden], or this
             rank's share of the tokens
    Comm:    as `RowParallelLinear`
    """
    if tp.axis.size == 1:
        return embedding(ids, weight)
    y: Tensor = reduce_from_tp(embedding(ids, weight, first_id), tp)
    return y


def vocab_shard(first_id: int, vocab_size: int, tp: TensorParallel) -> VocabShard | None:
    """How `linear_cross_entropy` sees a vocabulary divided over the axis; None where it is not."""
    if tp.axis.size == 1:
        return None

    def gather(stats: Tensor) -> Tensor:
        return gather_tokens(stats[None], tp.axis)

    return VocabShard(first_id, vocab_size, gather)


def qkv_spec(
    shape: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, tp: TensorParallel
) -> ShardSpec:
    """This rank's rows of a fused [queries | keys | values] weight or bias.

    With more ranks than key heads, several ranks hold the same head, and each computes the share of
    its gradient that comes from its own queries.
    """
    start, stop = split_range(heads, tp.axis)
    pieces = [Piece(start * head_dim, stop * head_dim)]
    if kv_heads >= tp.axis.size:
        low, high = split_range(kv_heads, tp.axis)
    else:
        low = tp.axis.rank * kv_heads // tp.axis.size
        high = low + 1
    for first in (heads, heads + kv_heads):
        rows = ((first + low) * head_dim, (first + high) * head_dim)
        pieces.append(Piece(*rows, copies=tp.kv, is_partial=tp.kv.size > 1))
    return ShardSpec(shape, tuple(pieces))


# --- moving activations ---------------------------------------------------------------------------


@uncompiled
def enter_tp(x: Tensor, tp: TensorParallel) -> Tensor:
    """The whole stream for a computation that is divided over the axis (Megatron's f).

    Shapes:  x [tokens, ...], or [tokens/tp, ...] if tokens are divided; returns [tokens, ...]
    Comm:    backward an all-reduce; if tokens are divided, an all-gather and backward a reduce-scatter
    """
    y: Tensor = _Enter.apply(x, tp)  # type: ignore[no-untyped-call]
    return y


@uncompiled
def reduce_from_tp(x: Tensor, tp: TensorParallel) -> Tensor:
    """The sum of every rank's share (Megatron's g); the inverse of `enter_tp`.

    Shapes:  x [tokens, ...]; returns [tokens, ...], or [tokens/tp, ...] if tokens are divided
    Comm:    an all-reduce; if tokens are divided, a reduce-scatter and backward an all-gather
    """
    y: Tensor = _Reduce.apply(x, tp)  # type: ignore[no-untyped-call]
    return y


def gather_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Every rank's rows one after the other; x [rows, ...], returns [rows · ranks, ...]."""
    whole = x.new_empty(x.shape[0] * axis.size, *x.shape[1:])
    start_all_gather(whole, x.contiguous(), axis).wait()
    return whole


def scatter_sum_tokens(x: Tensor, axis: Axis) -> Tensor:
    """This rank's share of the rows, summed over ranks; x [rows, ...], returns [rows / ranks, ...]."""
    part = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    start_reduce_scatter(part, x.contiguous(), axis).wait()
    return part


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return gather_tokens(x, tp.axis) if tp.divides_tokens else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if ctx.tp.divides_tokens:
            return scatter_sum_tokens(grads[0], ctx.tp.axis), None
        # A copy, since whoever else holds this gradient must not see the sum.
        return all_reduce(grads[0].clone(memory_format=torch.contiguous_format), ctx.tp.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        if tp.divides_tokens:
            return scatter_sum_tokens(x, tp.axis)
        return all_reduce(x.clone(memory_format=torch.contiguous_format), tp.axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather_tokens(grads[0], ctx.tp.axis) if ctx.tp.divides_tokens else grads[0], None


@uncompiled
def _column_parallel(x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel) -> Tensor:
    gradients = current_gradients()
    leaf = weight if gradients is None else deferred_leaf(weight)
    y: Tensor = _ColumnParallel.apply(x, leaf, bias, tp, gradients, weight)  # type: ignore[no-untyped-call]
    return y


class _ColumnParallel(torch.autograd.Function):
    """Saves its share of the tokens only, and sums dx over the axis while it computes dW."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        leaf: Tensor,
        bias: Tensor | None,
        tp: TensorParallel,
        gradients: WeightGradients | None,
        weight: Tensor,
    ) -> Tensor:
        ctx.tp, ctx.has_bias, ctx.gradients = tp, bias is not None, gradients
        ctx.weight = weight if gradients is not None else None
        ctx.save_for_backward(x, leaf)
        return F.linear(gather_tokens(x, tp.axis) if tp.divides_tokens else x, leaf, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight) = grads, ctx.saved_tensors
        axis: Axis = ctx.tp.axis
        is_deferred = ctx.gradients is not None
        if not ctx.tp.divides_tokens:
            dx = dy @ weight
            work = start_all_reduce(dx, axis)
        else:
            part = x.contiguous()
            if not is_deferred:
                x = part.new_empty(part.shape[0] * axis.size, part.shape[1])
                gathering = start_all_gather(x, part, axis)
            whole = dy @ weight
            if not is_deferred:
                gathering.wait()
            dx = torch.empty_like(part)
            work = start_reduce_scatter(dx, whole, axis)
        dw = None
        if is_deferred:
            divided = ctx.tp.divides_tokens
            ctx.gradients.defer(ctx.weight, lambda: dy.t() @ (gather_tokens(x, axis) if divided else x))
        else:
            dw = dy.t() @ x
        db = dy.sum(0) if ctx.has_bias else None
        work.wait()
        return dx, dw, db, None, None, None
