"""AdamW over a flat shard, in place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw


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
    grad_scale: float = 1.0,
) -> None:
    """One AdamW step on `weight` and both moments, with decoupled decay.

    g ← grad_scale · g;  m ← β₁m + (1-β₁)g;  v ← β₂v + (1-β₂)g²
    w ← w - lr · (m/(1-β₁ᵗ) / (sqrt(v/(1-β₂ᵗ)) + ε) + λw)
    `grad` may be left scaled.

    Shapes:  all [n] fp32, 1-D and contiguous; `step` is t, counted from 1
    Source:  Loshchilov and Hutter 2019, algorithm 2 (η = 1, decay scaled by lr as torch does)
    """
    adamw(
        [weight],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.tensor(float(step - 1), device=weight.device)],  # torch adds one before it uses it
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
        fused=True,
        grad_scale=torch.tensor(1 / grad_scale, device=weight.device),  # torch divides by its scale
    )
