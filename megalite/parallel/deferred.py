"""Weight gradients put off: what a zero-bubble schedule computes after the input gradient has left.

The gradient of a loss through y = x · Wᵀ has two independent products: dx = dy · W, which the previous
stage waits for, and dW = dyᵀ · x, which nobody waits for. A layer called while a `WeightGradients` is
current computes only dx in its backward pass and leaves dW there as a closure over x and dy. One
ordinary backward pass is then the input half, and running the closures is the weight half:

    with deferring(gradients):
        y = stage(x)               # `linear` remembers which gradients are current
    …
    with deferring(gradients):     # a recomputed forward must take the same path as the first
        torch.autograd.backward(y, dy)
    send(x.grad)
    gradients.run()                # now, or any time later

So each operation runs once, and every parameter sees one accumulation a micro-batch, in `run`, with
its hooks. (Asking autograd for the two halves one after the other would compute the chain of dx
twice, as the way from the loss to a weight goes through it.)

Layers with a backward of their own, such as tensor-parallel ones, ask `current_gradients()` in their
forward and call `defer` in their backward. What does not, such as a norm, has its cheap weight
gradient computed in the input half; all uses of one weight in a stage should do the same. Between the
halves each layer's x and dy stay alive, also where x was recomputed. Code under torch.compile has one
compiled backward, which nothing can be taken out of: it must run without a current queue.

Source:  Qi et al. 2023, section 2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightGradients:
    """The weight gradients that one stage's backward for one micro-batch has left to compute."""

    def __init__(self) -> None:
        self._waiting: dict[Tensor, list[Callable[[], Tensor]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def defer(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Have `gradient()`, of the weight's shape, added to the weight's gradient by `run`."""
        self._waiting.setdefault(weight, []).append(gradient)

    def run(self) -> None:
        """Compute what was deferred, accumulate it as a backward pass would, and forget it.

        One weight after another, in the order in which backward met them, so that one gradient is
        alive at a time. Post-accumulate hooks fire once for each weight, as they do in a backward.
        """
        while self._waiting:
            weight = next(iter(self._waiting))
            first, *others = self._waiting.pop(weight)
            with torch.no_grad():
                gradient = first()
                for other in others:
                    gradient = gradient + other()
            # Backward from a leaf is its accumulation alone, hooks included.
            torch.autograd.backward(weight, gradient)


# Not a ContextVar: autograd runs backward passes, and forwards they recompute, on threads of its own.
_current: WeightGradients | None = None


def current_gradients() -> WeightGradients | None:
    """Where a layer's backward leaves its weight gradient; None if it is to compute it on the spot."""
    return _current


@contextmanager
def deferring(gradients: WeightGradients | None) -> Iterator[None]:
    """Make `gradients` current for the forwards (and backwards that recompute forwards) inside."""
    global _current
    previous, _current = _current, gradients
    try:
        yield
    finally:
        _current = previous


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, is_transposed: bool = False) -> Tensor:
    """y = x · Wᵀ + b; the gradients of W and b are deferred if `WeightGradients` are current.

    Shapes:  x [..., in]; weight [out, in], or [in, out] if transposed; bias [out]; returns [..., out]
    """
    gradients = _current
    is_trained = weight.requires_grad and (bias is None or bias.requires_grad)
    if gradients is None or not is_trained or not torch.is_grad_enabled():
        return _linear(x, weight, bias, is_transposed)
    y: Tensor = _DeferredLinear.apply(  # type: ignore[no-untyped-call]
        x, deferred_leaf(weight), (weight, bias), gradients, is_transposed
    )
    return y


def deferred_leaf(weight: Tensor) -> Tensor:
    """A leaf with a weight's values, which has autograd visit a layer even where x needs no gradient.

    The weight itself would too, but its hooks would then fire in the input half, without a gradient.
    """
    return weight.detach().requires_grad_()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
    if not is_transposed:
        return nn.functional.linear(x, weight, bias)
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


class _DeferredLinear(torch.autograd.Function):
    """Backward returns dx alone; the closures for dW and db hold x and dy."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        parameters: tuple[Tensor, Tensor | None],  # in a tuple, so that autograd does not see them
        gradients: WeightGradients,
        is_transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.parameters, ctx.gradients, ctx.is_transposed = parameters, gradients, is_transposed
        return _linear(x, values, parameters[1], is_transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        weight, bias = ctx.parameters
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        inputs = x.reshape(-1, x.shape[-1])
        left, right = (inputs, rows) if ctx.is_transposed else (rows, inputs)
        ctx.gradients.defer(weight, lambda: left.t() @ right)
        if bias is not None:
            ctx.gradients.defer(bias, lambda: rows.sum(0))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        return grads[0] @ (values.t() if ctx.is_transposed else values), None, None, None, None
