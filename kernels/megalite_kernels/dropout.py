"""Dropout whose mask is a pure function of a key for each sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.cost import Cost
from megalite_kernels.counter import uniform
from megalite_kernels.dispatch import Impl, Resolved, resolve


def dropout(
    x: Tensor, p: float, keys: Tensor, places: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """Zero each element with probability `p` and divide the rest by 1 - p.

    The mask of a row depends on its key and its place among the rows of that key alone: it is the
    same on every layout, in every micro-batch, with every implementation, and when an activation is
    computed again.

    Shapes:  x [rows, ...]; keys [rows] int64; places [rows] int64, the row's number among those with its
             key, all 0 by default; returns x's shape and dtype
    Source:  Srivastava et al. 2014, section 4
    """
    chosen = resolve(impl, "dropout", x)
    if chosen == "reference":
        return dropout_reference(x, p, keys, places)
    y: Tensor = _Dropout.apply(x, p, keys, places, chosen)  # type: ignore[no-untyped-call]
    return y


def dropout_reference(x: Tensor, p: float, keys: Tensor, places: Tensor | None = None) -> Tensor:
    """`dropout` as a product with its mask, which autograd then keeps."""
    return x * _mask(x, p, keys, places)


def cost(elements: int, element_bytes: int) -> Cost:
    """Forward, and backward as well: read, multiplied, written. The hash is integer work and not counted."""
    return Cost(elements, 2 * elements * element_bytes)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, p: float, keys: Tensor, places: Tensor | None, chosen: Resolved
    ) -> Tensor:
        ctx.p, ctx.chosen = p, chosen
        ctx.save_for_backward(keys, places)
        return _dropped(x, p, keys, places, chosen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        keys, places = ctx.saved_tensors
        return _dropped(grads[0], ctx.p, keys, places, ctx.chosen), None, None, None, None


def _dropped(x: Tensor, p: float, keys: Tensor, places: Tensor | None, chosen: Resolved) -> Tensor:
    if chosen == "triton":
        from megalite_kernels.gpu.dropout import dropout as kernel

        y: Tensor = kernel(x, p, keys, places)
        return y
    return dropout_reference(x, p, keys, places)


def _mask(x: Tensor, p: float, keys: Tensor, places: Tensor | None) -> Tensor:
    """0 or 1/(1-p) for each element, in x's dtype; drawn again in backward instead of kept."""
    width = math.prod(x.shape[1:])
    index = torch.arange(width, device=x.device)
    if places is not None:
        index = index + width * places[:, None]
    keep = uniform(keys[:, None], index) >= p
    return (keep.to(x.dtype) / (1 - p)).view(x.shape)
