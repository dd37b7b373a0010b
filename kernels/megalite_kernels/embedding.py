"""Token embedding whose gradient is summed in fp32, in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalite_kernels.cost import Cost
from megalite_kernels.dispatch import Impl, Resolved, resolve


def embedding(ids: Tensor, weight: Tensor, first_id: int | None = None, *, impl: Impl = "auto") -> Tensor:
    """Rows of `weight`; a frequent token's gradients are summed in fp32 and leave unrounded.

    torch sums in the weight's dtype: in bf16 the thousandth occurrence of a token adds nothing.
    With a `first_id`, `weight` holds the rows from it on of a table divided among ranks; ids of other rows
    give zeros and have no gradient.

    Shapes:  ids [...] int64; weight [vocab, hidden]; returns [..., hidden] in weight's dtype
    Raises:  IndexError from torch on CPU, without a `first_id`, if an id is not in the vocabulary
    """
    chosen = resolve(impl, "embedding", weight)
    is_mine = None
    if first_id is not None:
        ids = ids - first_id
        is_mine = (ids >= 0) & (ids < weight.shape[0])
        ids = ids.where(is_mine, -1)
    if chosen == "reference":
        return embedding_reference(ids, weight)
    y: Tensor = _Embedding.apply(ids, weight, is_mine, chosen)  # type: ignore[no-untyped-call]
    return y


def embedding_reference(ids: Tensor, weight: Tensor) -> Tensor:
    """`embedding` as a choice of rows; zeros for the id -1."""
    return weight[ids.clamp_min(0)].masked_fill(ids[..., None] < 0, 0.0)


def cost(tokens: int, vocab: int, hidden: int, element_bytes: int) -> tuple[Cost, Cost]:
    """Forward: rows read and written. Backward: gradients read, added up, and the fp32 table written."""
    rows = tokens * hidden * element_bytes
    return Cost(0, 2 * rows + 8 * tokens), Cost(tokens * hidden, rows + 8 * tokens + 4 * vocab * hidden)


class _Embedding(torch.autograd.Function):
    """Takes ids that are rows of the weight, or -1 where `is_mine` is false."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, is_mine: Tensor | None, chosen: Resolved) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.chosen = weight.shape[0], chosen
        if is_mine is None:
            return F.embedding(ids, weight)
        return F.embedding(ids.clamp_min(0), weight).masked_fill(~is_mine[..., None], 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.chosen == "triton":
            from megalite_kernels.gpu.embedding import embedding_backward

            return None, embedding_backward(grads[0], ids, ctx.rows), None, None
        wide = grads[0].to(torch.promote_types(grads[0].dtype, torch.float32))
        # The padding index, -1, has no gradient.
        dw = torch.ops.aten.embedding_dense_backward(wide, ids, ctx.rows, -1, False)
        return None, dw, None, None
