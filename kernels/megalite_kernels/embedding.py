"""Token embedding whose gradient is summed in fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight`; a frequent token's gradients are summed in fp32 and leave unrounded.

    torch sums in the weight's dtype: in bf16 the thousandth occurrence of a token adds nothing.

    Shapes:  ids [...] integer; weight [vocab, hidden]; returns [..., hidden] in weight's dtype
    """
    y: Tensor = _Embedding.apply(ids, weight)  # type: ignore[no-untyped-call]
    return y


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = weight.shape[0]
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        wide = grads[0].to(torch.promote_types(grads[0].dtype, torch.float32))
        return None, torch.ops.aten.embedding_dense_backward(wide, ids, ctx.rows, -1, False)
