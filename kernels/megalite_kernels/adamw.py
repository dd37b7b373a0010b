"""AdamW over a flat shard, in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from megalite_kernels.cost import Cost
from megalite_kernels.dispatch import Impl, resolve

# On CPU torch computes so many elements at once, or a divisor of it, and what is over one by one, rounded
# otherwise. So the last few are filled up: what an element becomes must not depend on where in a shard it
# lies, for another rank may hold it elsewhere.
_LANES = 16


def adamw_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
    skip: Tensor | None = None,
    rounded: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """One AdamW step on `weight` and both moments, with decoupled decay.

    g ← grad_scale · g;  m ← β₁m + (1-β₁)g;  v ← β₂v + (1-β₂)g²
    w ← w - lr · (m/(1-β₁ᵗ) / (sqrt(v/(1-β₂ᵗ)) + ε) + λw)
    `grad` may be left scaled. `rounded` gets the new weights in its dtype. If `skip` is not zero, nothing
    is written at all; the host need not know.

    Shapes:  all [n], 1-D and contiguous: weight and moments fp32; grad fp32, bf16 or fp16; rounded of any
             dtype; skip, and grad_scale where it is a tensor, 0-dim; `step` is t, counted from 1
    Source:  Loshchilov and Hutter 2019, algorithm 2 (η = 1, decay scaled by lr as torch does)
    """
    chosen = resolve(impl, "adamw", weight)
    state = (weight, grad, exp_avg, exp_avg_sq)
    if chosen == "triton":
        from megalite_kernels.gpu.adamw import step as kernel

        factor, scale = (1.0, grad_scale) if isinstance(grad_scale, Tensor) else (grad_scale, None)
        settings = (lr, beta1, beta2, eps, weight_decay, 1 - beta1**step, 1 - beta2**step)
        kernel(*state, rounded, skip, scale, factor, *settings)
        return
    if chosen == "reference":
        new = adamw_reference(*state, lr, beta1, beta2, eps, weight_decay, step, grad_scale)
        for tensor, value in zip((weight, exp_avg, exp_avg_sq), new, strict=True):
            _write(tensor, value, skip)
    else:
        # Torch adds one to its step before it uses it, divides by its scale, and writes to the gradient.
        if isinstance(grad_scale, Tensor):
            inverse = grad_scale.float().reciprocal()
        else:
            inverse = torch.tensor(1 / grad_scale, device=weight.device)
        flat = [weight, grad.to(weight.dtype), exp_avg, exp_avg_sq]
        rest = len(weight) % _LANES if weight.device.type == "cpu" else 0
        parts = [[t[:-rest], F.pad(t[-rest:], (0, _LANES - rest))] if rest else [t] for t in flat]
        adamw(
            parts[0],
            parts[1],
            parts[2],
            parts[3],
            [],
            [torch.tensor(float(step - 1), device=weight.device) for _ in parts[0]],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
            fused=True,
            grad_scale=inverse,
            found_inf=None if skip is None else skip.ne(0).float(),
        )
        if rest:
            for place in (0, 2, 3):
                flat[place][-rest:] = parts[place][1][:rest]
    if rounded is not None:
        _write(rounded, weight, skip)


def adamw_reference(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """New weight and moments as the formula reads."""
    g = grad_scale * grad.to(weight.dtype)
    m = beta1 * exp_avg + (1 - beta1) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    return weight - lr * (update + weight_decay * weight), m, v


def cost(size: int, grad_bytes: int = 4, rounded_bytes: int = 0) -> Cost:
    """One step: weight and moments in fp32 read and written, the gradient read, the rounded copy written."""
    return Cost(16 * size, (24 + grad_bytes + rounded_bytes) * size)


def _write(tensor: Tensor, value: Tensor, skip: Tensor | None) -> None:
    tensor.copy_(value if skip is None else tensor.where(skip != 0, value.to(tensor.dtype)))
