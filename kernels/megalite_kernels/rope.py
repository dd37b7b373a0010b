"""Rotary position embedding with explicit positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels.dispatch import Impl, resolve


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Rotate each head's pairs (i, i + head_dim/2) by its position's angles.

    y₁ = x₁ cos - x₂ sin;  y₂ = x₂ cos + x₁ sin, for the two halves of a head, in fp32.

    Shapes:  x [batch, seq, heads, head_dim]; cos, sin [batch or 1, seq, head_dim/2]
             fp32; returns x's shape and dtype, stored heads before seq as attention reads
    Source:  Su et al. 2021, eq. 34 (pairing of halves as in GPT-NeoX and Llama)
    """
    if resolve(impl, "rope", x) == "reference":
        return rope_reference(x, cos, sin)
    y: Tensor = _Rope.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


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
    wide = x.transpose(1, 2).to(
        torch.promote_types(x.dtype, cos.dtype), memory_format=torch.contiguous_format
    )
    first, second = wide.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    y = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return y.to(x.dtype).transpose(1, 2)
