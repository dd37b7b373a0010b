"""RMSNorm and LayerNorm over the last dimension, computed in fp32 (or wider)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels.dispatch import Impl, resolve


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: Impl = "auto") -> Tensor:
    """Scale each row to root mean square one, then by `weight`.

    y = x / sqrt(mean(x²) + eps) · weight, with one rounding to x's dtype at the end (Hugging Face's
    Llama rounds once before the weight as well; in fp32 the two are equal).

    Shapes:  x [..., dim]; weight [dim]; returns x's shape and dtype
    Source:  Zhang and Sennrich 2019, eq. 4
    """
    chosen = resolve(impl, "norm", x)
    if chosen == "reference":
        return rms_norm_reference(x, weight, eps)
    if chosen == "triton":
        from megalite_kernels.gpu.norm import rms_norm as kernel

        result: Tensor = kernel(x, weight, eps)[0]
        return result
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


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, impl: Impl = "auto") -> Tensor:
    """Shift each row to mean zero, scale it to variance one, then by `weight` and `bias`.

    y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias

    Shapes:  x [..., dim]; weight, bias [dim]; returns x's shape and dtype
    Source:  Ba et al. 2016, eq. 4
    """
    if resolve(impl, "norm", x) == "reference":
        return layer_norm_reference(x, weight, bias, eps)
    y: Tensor = _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return y


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layer_norm` as its formula reads."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (centred * rstd * weight + bias).to(x.dtype)


class _LayerNorm(torch.autograd.Function):
    """torch's kernels, always on fp32 (or wider): in bf16 its CPU backward adds up the gradients of
    weight and bias in bf16, of which a few thousand rows leave nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        wide, weight, bias = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (x, weight, bias))
        y, mean, rstd = torch.native_layer_norm(wide, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            grads[0].to(mean.dtype), x.to(mean.dtype), weight.shape, mean, rstd, weight, bias, [True] * 3
        )
        return dx.to(x.dtype), dw, db, None
