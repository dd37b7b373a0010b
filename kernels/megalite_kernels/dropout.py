"""Dropout whose mask is a pure function of a key for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels.counter import uniform


def dropout(x: Tensor, p: float, keys: Tensor, places: Tensor | None = None) -> Tensor:
    """Zero each element with probability `p` and divide the rest by 1 - p.

    The mask of a row depends on its key and its place among the rows of that key alone: it is the
    same on every layout, in every micro-batch, and when an activation is computed again.

    Shapes:  x [rows, ...]; keys [rows] int64; places [rows] int64, the row's number among those with its
             key, all 0 by default; returns x's shape and dtype
    Source:  Srivastava et al. 2014, section 4
    """
    y: Tensor = _Dropout.apply(x, p, keys, places)  # type: ignore[no-untyped-call]
    return y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, keys: Tensor, places: Tensor | None) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(keys, places)
        return x * _mask(x, p, keys, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        keys, places = ctx.saved_tensors
        return grads[0] * _mask(grads[0], ctx.p, keys, places), None, None, None


def _mask(x: Tensor, p: float, keys: Tensor, places: Tensor | None) -> Tensor:
    """0 or 1/(1-p) for each element, in x's dtype; drawn again in backward instead of kept."""
    width = x[0].numel()
    index = torch.arange(width, device=x.device)
    if places is not None:
        index = index + width * places[:, None]
    keep = uniform(keys[:, None], index) >= p
    return (keep.to(x.dtype) / (1 - p)).view(x.shape)
