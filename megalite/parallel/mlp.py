"""The MLP's two products and the activation between them as one operation, divided over the tp axis.

Of its activations it saves its input, or the rank's share of it, and the pre-activation: the hidden
layer of ffn columns is formed again in backward, where the pre-activation is read anyway. That is a third
of what a block's MLP would keep with SwiGLU, for one multiplication an element.

Source:  Shoeybi et al. 2019, section 3 (columns, then rows); Korthikanti et al. 2022, section 4.2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite.parallel.collectives import all_reduce, start_all_gather, start_all_reduce, start_reduce_scatter
from megalite.parallel.deferred import WeightGradients, current_gradients, deferred_leaf
from megalite.parallel.layers import TensorParallel, gather_tokens, scatter_sum_tokens
from megalite.parallel.uncompiled import uncompiled
from megalite_kernels import activation_backward, linear_activation
from megalite_kernels.mlp import Activation

Weights = tuple[Tensor, Tensor, Tensor | None]


def parallel_mlp(
    x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, activation: Activation, tp: TensorParallel
) -> Tensor:
    """y = Σ_tp act(x·Upᵀ + b)·Down with the ffn columns divided over the axis.

    The weights' gradients are deferred if `WeightGradients` are current.

    Shapes:  x [tokens, hidden], or [tokens/tp, hidden] if tokens are divided; up [ffn/tp, hidden], for
             swiglu [2 · ffn/tp, hidden] with the gate's rows first; down [ffn/tp, hidden]; up_bias
             [up's rows]; returns x's shape
    Comm:    forward an all-reduce of tokens·hidden elements, backward another while the weights'
             gradients are computed; if tokens are divided, each becomes an all-gather and a
             reduce-scatter
    """
    gradients = current_gradients()
    is_trained = up.requires_grad and torch.is_grad_enabled()
    weights: Weights = (up, down, up_bias)
    if gradients is None or not is_trained:
        gradients = None
        leaves = weights
    else:
        leaves = (deferred_leaf(up), down.detach(), None if up_bias is None else up_bias.detach())
    apply = _apply if tp.axis.size == 1 else _apply_uncompiled
    y: Tensor = apply(x, leaves, activation, tp, gradients, weights)
    return y


def _apply(
    x: Tensor,
    leaves: Weights,
    activation: Activation,
    tp: TensorParallel,
    gradients: WeightGradients | None,
    weights: Weights,
) -> Tensor:
    y: Tensor = _ParallelMLP.apply(x, *leaves, activation, tp, gradients, weights)  # type: ignore[no-untyped-call]
    return y


_apply_uncompiled = uncompiled(_apply)


class _ParallelMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        activation: Activation,
        tp: TensorParallel,
        gradients: WeightGradients | None,
        weights: Weights,  # in a tuple, so that autograd does not see them
    ) -> Tensor:
        ctx.activation, ctx.tp, ctx.gradients = activation, tp, gradients
        ctx.weights = weights if gradients is not None else None
        ctx.has_bias = up_bias is not None
        whole = gather_tokens(x, tp.axis) if tp.divides_tokens else x
        hidden, pre = linear_activation(whole, up, up_bias, activation=activation)
        ctx.save_for_backward(x, pre, up, down)
        y = hidden @ down
        if tp.axis.size == 1:
            return y
        return scatter_sum_tokens(y, tp.axis) if tp.divides_tokens else all_reduce(y, tp.axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, pre, up, down = ctx.saved_tensors
        tp: TensorParallel = ctx.tp
        axis, is_deferred = tp.axis, ctx.gradients is not None
        dy = grads[0]
        gathering = None
        if tp.divides_tokens:
            dy, part = gather_tokens(dy, axis), x.contiguous()
            if not is_deferred:
                x = part.new_empty(part.shape[0] * axis.size, part.shape[1])
                gathering = start_all_gather(x, part, axis)
        d_pre, hidden = activation_backward(dy, down, pre, activation=ctx.activation)
        whole = d_pre @ up
        dx, work = whole, None
        if tp.divides_tokens:
            dx = torch.empty_like(part)
            work = start_reduce_scatter(dx, whole, axis)
        elif axis.size > 1:
            work = start_all_reduce(dx, axis)
        rest: tuple[Tensor | None, ...] = (None, None, None)
        if is_deferred:
            _defer(ctx, x, dy, d_pre, hidden)
        else:
            d_down = hidden.t() @ dy
            del hidden
            if gathering is not None:
                gathering.wait()
            rest = (d_pre.t() @ x, d_down, d_pre.sum(0) if ctx.has_bias else None)
        if work is not None:
            work.wait()
        return dx, *rest, None, None, None, None


def _defer(ctx: Any, x: Tensor, dy: Tensor, d_pre: Tensor, hidden: Tensor) -> None:
    gradients: WeightGradients = ctx.gradients
    up, down, up_bias = ctx.weights
    axis, is_divided = ctx.tp.axis, ctx.tp.divides_tokens
    gradients.defer(down, lambda: hidden.t() @ dy)
    gradients.defer(up, lambda: d_pre.t() @ (gather_tokens(x, axis) if is_divided else x))
    if up_bias is not None:
        gradients.defer(up_bias, lambda: d_pre.sum(0))
