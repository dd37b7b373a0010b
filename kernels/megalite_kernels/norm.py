"""RMSNorm and LayerNorm over the last dimension, computed in fp32 (or wider)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels.dispatch import Impl, resolve


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: Impl = "auto") -> Tensor:
    """Scale each row to root mean square one, then by `weight`.

    y = x / sqrt(mean(x²) + eps) · weight, with one rounding to x's dtype at the end (Hugging Face's
    Llama rounds once before the weight as well; in fp32 the two are equal).

    Shapes:  x [..., dim]; weight [dim]; returns x's shape and dtype
    Source:  Zhang and Sennrich 2019, eq. 4
    """
    if resolve(impl) == "reference":
        return rms_norm_reference(x, weight, eps)
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` as its formula reads."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * rstd * weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Saves x and one number a row; the weight's gradient leaves in fp32, unrounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        # With n = x·rstd:  dw = Σ_rows g∘n;  dx = rstd · (g∘w - n · mean(g∘w∘n))
        x, weight, rstd = ctx.saved_tensors
        g = grads[0].to(rstd.dtype)
        normed = x * rstd
        gn = g * normed
        dw = gn.sum(tuple(range(x.dim() - 1)))
        gn.mul_(weight)
        dx = (g * weight).sub_(normed.mul_(gn.mean(-1, keepdim=True))).mul_(rstd)
        return dx.to(x.dtype), dw, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Shift each row to mean zero, scale it to variance one, then by `weight` and `bias`.

    torch's own kernel already computes in fp32 and reads each row once.

    Shapes:  x [..., dim]; weight, bias [dim]; returns x's shape and dtype
    Source:  Ba et al. 2016, eq. 4
    """
    return F.layer_norm(x, weight.shape, weight, bias, eps)
