"""RMSNorm and LayerNorm over the last dimension, computed in fp32 (or wider)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels.cost import Cost
from megalite_kernels.dispatch import Impl, Resolved, resolve


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: Impl = "auto") -> Tensor:
    """Scale each row to root mean square one, then by `weight`.

    y = x / sqrt(mean(x²) + eps) · weight, with one rounding to x's dtype at the end (Hugging Face's
    Llama rounds once before the weight as well; in fp32 the two are equal).

    Shapes:  x [..., dim]; weight [dim]; returns x's shape and dtype
    Source:  Zhang and Sennrich 2019, eq. 4
    """
    chosen = _resolve(impl, "rms_norm", x)
    if chosen == "reference":
        return rms_norm_reference(x, weight, eps)
    if chosen == "triton":
        from megalite_kernels.gpu.norm import rms_norm as kernel

        result: Tensor = kernel(x, weight, eps)[0]
        return result
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def add_rms_norm(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and norm the sum: y = rms_norm(x + branch), and x + branch.

    The sum is rounded to x's dtype before it is normed, so that y is of the stream as it is stored.

    Shapes:  x, branch [..., dim] of one dtype; weight [dim]; returns y and the stream, as x
    """
    chosen = _resolve(impl, "add_rms_norm", x)
    if chosen == "triton":
        from megalite_kernels.gpu.norm import add_rms_norm as kernel

        y, stream, _ = kernel(x, branch, weight, eps)
        return y, stream
    stream = x + branch
    return rms_norm(stream, weight, eps, impl=chosen), stream


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
        return _rounded((wide * rstd).mul_(weight), x.dtype)

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
    chosen = _resolve(impl, "layer_norm", x)
    if chosen == "reference":
        return layer_norm_reference(x, weight, bias, eps)
    if chosen == "triton":
        from megalite_kernels.gpu.norm import layer_norm as kernel

        result: Tensor = kernel(x, weight, bias, eps)[0]
        return result
    y: Tensor = _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return y


def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` with LayerNorm: y = layer_norm(x + branch), and x + branch.

    Shapes:  x, branch [..., dim] of one dtype; weight, bias [dim]; returns y and the stream, as x
    """
    chosen = _resolve(impl, "add_layer_norm", x)
    if chosen == "triton":
        from megalite_kernels.gpu.norm import add_layer_norm as kernel

        y, stream, _, _ = kernel(x, branch, weight, bias, eps)
        return y, stream
    stream = x + branch
    return layer_norm(stream, weight, bias, eps, impl=chosen), stream


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
        return _rounded(y, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            grads[0].to(mean.dtype), x.to(mean.dtype), weight.shape, mean, rstd, weight, bias, [True] * 3
        )
        return dx.to(x.dtype), dw, db, None


def _rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y in `dtype`, and never the very tensor: compiled, torch 2.11 takes what an operation returned as it
    was, or wrote to in place, for an output without a gradient, and gives zeros."""
    return y.view_as(y) if y.dtype == dtype else y.to(dtype)


def norm_cost(
    rows: int, dim: int, dtype: torch.dtype, *, is_added: bool = False, is_backward: bool = False
) -> Cost:
    """Least work of a norm, or with `is_added` of one with its residual addition.

    Forward reads x and writes y; an addition also reads the branch and writes the stream. Backward reads
    x and the gradient and writes dx, which is the branch's gradient as well; after an addition it also
    reads the stream's gradient. The weights and the few numbers of a row are left out of bytes, and
    flops are counted as one a term of the formula.
    """
    passes = (2 + 2 * is_added) if not is_backward else (3 + is_added)
    flops = (4 + is_added) if not is_backward else (9 + is_added)
    return Cost(rows * dim * flops, rows * dim * passes * dtype.itemsize)


def _resolve(impl: Impl, operation: str, x: Tensor) -> Resolved:
    """By width: what wins at 128 need not at 8192. The variants are "rms_norm/4096" and the like."""
    return resolve(impl, "norm", x, f"{operation}/{max(64, 1 << (x.shape[-1] - 1).bit_length())}")
