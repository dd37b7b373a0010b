"""Rotary position embedding with explicit positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels.cost import Cost
from megalite_kernels.dispatch import Impl, resolve


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Rotate each head's pairs (i, i + head_dim/2) by its position's angles.

    y₁ = x₁ cos - x₂ sin;  y₂ = x₂ cos + x₁ sin, for the two halves of a head, in fp32.

    Shapes:  x [batch, seq, heads, head_dim]; cos, sin [batch or 1, seq, head_dim/2]
             fp32; returns x's shape and dtype (torch's path stores heads before seq, as its
             attention reads)
    Source:  Su et al. 2021, eq. 34 (pairing of halves as in GPT-NeoX and Llama)
    """
    chosen = resolve(impl, "rope", x, f"rope/{x.shape[-1]}")
    if chosen == "reference":
        return rope_reference(x, cos, sin)
    if chosen == "triton":
        from megalite_kernels.gpu.rope import rope as kernel

        result: Tensor = kernel(x, cos, sin)
        return result
    y: Tensor = _Rope.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


def rope_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a packed projection apart into q, k and v, with q and k rotated as `rope` does.

    One launch each way: backward rotates the gradients back and packs them as it writes. Neither is in
    place. Selective recompute starts again from the projection, which must then be as its GEMM left it;
    and the gradients of q, k and v come apart, so that a rotation in place would need a pass before it to
    pack them. This way v is copied, and the projection is free afterwards.

    Shapes:  qkv [batch, seq, heads + 2 · kv_heads, head_dim], the queries' heads first, then keys, then
             values; cos, sin [batch or 1, seq, head_dim/2] fp32; returns q [batch, seq, heads,
             head_dim], k and v [batch, seq, kv_heads, head_dim]
    """
    if qkv.shape[2] != heads + 2 * kv_heads:
        raise ValueError(f"qkv has {qkv.shape[2]} heads, not {heads} + 2 · {kv_heads}")
    chosen = resolve(impl, "rope", qkv, f"rope_qkv/{qkv.shape[-1]}")
    if chosen == "triton":
        from megalite_kernels.gpu.rope import rope_qkv as kernel

        q, k, v = kernel(qkv, cos, sin, heads, kv_heads)
        return q, k, v
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=2)
    return rope(q, cos, sin, impl=chosen), rope(k, cos, sin, impl=chosen), v


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope` as its formula reads."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None  # the inverse rotation


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Reordered before it is widened: a copy that does both takes twice the time of one after the other.
    wide = x.transpose(1, 2).contiguous().to(torch.promote_types(x.dtype, cos.dtype))
    first, second = wide.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    y = (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin))
    return torch.cat(y, -1).to(x.dtype).transpose(1, 2)


def rope_cost(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> Cost:
    """Least work of rotating `heads` heads (q's and k's together) in place, forward or backward: each
    read and written once, six flops a pair, the angles read in fp32."""
    elements = tokens * heads * head_dim
    return Cost(3 * elements, 2 * elements * dtype.itemsize + 4 * tokens * head_dim)
