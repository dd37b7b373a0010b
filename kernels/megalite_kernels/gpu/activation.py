"""SwiGLU and GELU, elementwise, in Triton; and their formulas for the epilogues of the MLP's GEMMs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.gpu.launch import Case, launch, like, meta, operator
from megalite_kernels.tiles import tile


@triton.jit
def _gate(x, ACTIVATION: tl.constexpr):
    # The factor s of act(x) = x·s, and its derivative.
    if ACTIVATION == "gelu":
        s = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        # (1 + tanh z)/2 = σ(2z), so that GPT-2's GELU is a SiLU of another argument.
        z, z_slope = x, 1.0
        if ACTIVATION == "gelu_tanh":
            z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
            z_slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        # From e^-|z|, which neither overflows nor leaves 1 − s to what s was rounded by.
        e = tl.exp(-tl.abs(z))
        r = 1.0 / (1.0 + e)
        s = tl.where(z >= 0, r, e * r)
        slope = e * r * r * z_slope
    return s, slope


@triton.jit
def activate(pre, up, ACTIVATION: tl.constexpr):
    """hidden in fp32 from the stored pre-activation; `up` counts for SwiGLU alone."""
    value = pre.to(tl.float32)
    s, _ = _gate(value, ACTIVATION)
    hidden = value * s
    if ACTIVATION == "swiglu":
        hidden *= up.to(tl.float32)
    return hidden


@triton.jit
def activate_backward(d_hidden, pre, up, ACTIVATION: tl.constexpr):
    """Gradients of `pre` and of `up`, and hidden formed again, in fp32."""
    value = pre.to(tl.float32)
    s, slope = _gate(value, ACTIVATION)
    hidden = value * s
    d_pre, d_up = d_hidden * (s + value * slope), d_hidden * hidden
    if ACTIVATION == "swiglu":
        u = up.to(tl.float32)
        d_pre *= u
        hidden *= u
    return d_pre, d_up, hidden


@triton.jit
def _activation_forward(pre, hidden, ffn, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < ffn
    parts: tl.constexpr = 2 if ACTIVATION == "swiglu" else 1
    place = row * parts * ffn + column
    value = tl.load(pre + place, mask=inside, other=0.0)
    up = tl.load(pre + place + ffn, mask=inside, other=0.0) if parts == 2 else value
    result = activate(value, up, ACTIVATION)
    tl.store(hidden + row * ffn + column, result.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _activation_backward(
    d_hidden, pre, d_pre, hidden, ffn,
    ACTIVATION: tl.constexpr, HAS_HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < ffn
    parts: tl.constexpr = 2 if ACTIVATION == "swiglu" else 1
    place = row * parts * ffn + column
    value = tl.load(pre + place, mask=inside, other=0.0)
    up = tl.load(pre + place + ffn, mask=inside, other=0.0) if parts == 2 else value
    grad = tl.load(d_hidden + row * ffn + column, mask=inside, other=0.0).to(tl.float32)
    d_value, d_up, again = activate_backward(grad, value, up, ACTIVATION)
    tl.store(d_pre + place, d_value.to(d_pre.dtype.element_ty), mask=inside)
    if parts == 2:
        tl.store(d_pre + place + ffn, d_up.to(d_pre.dtype.element_ty), mask=inside)
    if HAS_HIDDEN:
        tl.store(hidden + row * ffn + column, again.to(hidden.dtype.element_ty), mask=inside)


def _hidden_like(pre: Tensor, activation: str) -> Tensor:
    return pre.new_empty(*pre.shape[:-1], pre.shape[-1] // (2 if activation == "swiglu" else 1))


def _forward(pre: Tensor, activation: str) -> Tensor:
    pre, hidden = pre.contiguous(), _hidden_like(pre, activation)
    constants = tile("activation", "forward", pre.device)
    if hidden.numel():
        ffn = hidden.shape[-1]
        grid = (hidden.numel() // ffn, triton.cdiv(ffn, constants["BLOCK"]))
        launch(_activation_forward, grid, pre, hidden, ffn, ACTIVATION=activation, **constants)
    return hidden


def _launch_backward(d_hidden: Tensor, pre: Tensor, hidden: Tensor | None, activation: str) -> Tensor:
    pre, d_hidden = pre.contiguous(), d_hidden.contiguous()
    d_pre = torch.empty_like(pre)
    constants = tile("activation", "backward", pre.device)
    if pre.numel():
        ffn = d_hidden.shape[-1]
        launch(
            _activation_backward,
            (d_hidden.numel() // ffn, triton.cdiv(ffn, constants["BLOCK"])),
            *(d_hidden, pre, d_pre, d_hidden if hidden is None else hidden, ffn),
            ACTIVATION=activation,
            HAS_HIDDEN=hidden is not None,
            **constants,
        )
    return d_pre


def _backward(d_hidden: Tensor, pre: Tensor, activation: str) -> Tensor:
    return _launch_backward(d_hidden, pre, None, activation)


def _backward_again(d_hidden: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    hidden = _hidden_like(pre, activation)
    return _launch_backward(d_hidden, pre, hidden, activation), hidden


activation = operator("activation", _hidden_like)(_forward)
activation_backward = operator("activation_backward", lambda d_hidden, pre, activation: like(pre))(_backward)
activation_backward_again = operator(
    "activation_backward_again",
    lambda d_hidden, pre, activation: (like(pre), _hidden_like(pre, activation)),
)(_backward_again)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.activation = inputs[1]


def _grads(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return activation_backward(grad, *ctx.saved_tensors, ctx.activation), None


activation.register_autograd(_grads, setup_context=_save)


def cases() -> Iterator[Case]:
    """Every activation; forward, and backward with hidden formed again."""
    for name in ("swiglu", "gelu", "gelu_tanh"):
        pre = meta(8, 2048 if name == "swiglu" else 1024, dtype=torch.bfloat16)
        hidden = meta(8, 1024, dtype=torch.bfloat16)
        yield Case(f"forward/{name}", partial(_forward, pre, name))
        yield Case(f"backward/{name}", partial(_backward_again, hidden, pre, name))
