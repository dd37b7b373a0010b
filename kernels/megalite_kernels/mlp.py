"""Activations of the MLP."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels.dispatch import Impl, resolve


def swiglu(gate_up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """SiLU of the gate half times the up half.

    y = g · sigmoid(g) · u  with (g, u) the halves of the last dimension. Backward recomputes the
    activation from `gate_up`, so nothing else is saved.

    Shapes:  gate_up [..., 2 · ffn]; returns [..., ffn]
    Source:  Shazeer 2020, eq. 5
    """
    if resolve(impl, "swiglu", gate_up) == "reference":
        return swiglu_reference(gate_up)
    y: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return y


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """`swiglu` as its formula reads."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d_up = F.silu(gate).mul_(grads[0])
        d_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return torch.cat((d_gate, d_up), dim=-1)


def gelu(x: Tensor, *, tanh: bool = False) -> Tensor:
    """x · Φ(x), or with `tanh` GPT-2's approximation of it.

    Shapes:  x [...]; returns x's shape
    Source:  Hendrycks and Gimpel 2016, eq. 2 and section 2
    """
    return F.gelu(x, approximate="tanh" if tanh else "none")
