"""Dropout whose mask is a pure function of a key for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels.counter import uniform


def dropout(x: Tensor, p: float, keys: Tensor) -> Tensor:
    """Zero each element with probability `p` and divide the rest by 1 - p.

    The mask of a sample depends on its key and the element's place in the sample alone: it is the
    same on every layout, in every micro-batch, and when an activation is computed again.

    Shapes:  x [batch, ...]; keys [batch] int64; returns x's shape and dtype
    Source:  Srivastava et al. 2014, section 4
    """
    y: Tensor = _Dropout.apply(x, p, keys)  # type: ignore[no-untyped-call]
    return y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, keys: Tensor) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(keys)
        return x * _mask(x, p, keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (keys,) = ctx.saved_tensors
        return grads[0] * _mask(grads[0], ctx.p, keys), None, None


def _mask(x: Tensor, p: float, keys: Tensor) -> Tensor:
    """0 or 1/(1-p) for each element, in x's dtype; drawn again in backward instead of kept."""
    index = torch.arange(x[0].numel(), device=x.device)
    keep = uniform(keys[:, None], index) >= p
    return (keep.to(x.dtype) / (1 - p)).view(x.shape)
