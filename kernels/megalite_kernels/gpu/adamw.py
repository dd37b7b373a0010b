"""AdamW in Triton: one pass over a flat shard that also leaves the weights in the compute dtype."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.gpu.launch import DTYPES, Case, launch, meta, narrow, operator
from megalite_kernels.tiles import tile


@triton.jit
def _adamw(
    weight, grad, exp_avg, exp_avg_sq, rounded, skip, scale, factor,
    lr, beta1, rest1, beta2, rest2, eps, weight_decay, step_size, root2, size,
    HAS_ROUNDED: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if HAS_SKIP:  # then nothing is read either
        size = tl.where(tl.load(skip) == 0, size, 0)
    inside = place < size
    factor = tl.load(scale).to(tl.float32) if HAS_SCALE else narrow(factor)
    w = tl.load(weight + place, mask=inside, other=0.0)
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * factor
    m = tl.load(exp_avg + place, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + place, mask=inside, other=0.0)
    m = narrow(beta1) * m + narrow(rest1) * g
    v = narrow(beta2) * v + narrow(rest2) * g * g
    w -= narrow(lr) * narrow(weight_decay) * w
    w -= narrow(step_size) * m / (tl.sqrt_rn(v) / narrow(root2) + narrow(eps))
    tl.store(exp_avg + place, m, mask=inside)
    tl.store(exp_avg_sq + place, v, mask=inside)
    tl.store(weight + place, w, mask=inside)
    if HAS_ROUNDED:
        tl.store(rounded + place, w.to(rounded.dtype.element_ty), mask=inside)


def _step(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rounded: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    factor: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    correction1: float,
    correction2: float,
) -> None:
    size = weight.numel()
    if not size:
        return
    constants = tile("adamw", "step", weight.device)
    optional = (weight if t is None else t for t in (rounded, skip, scale))
    launch(
        _adamw,
        (triton.cdiv(size, constants["BLOCK"]),),
        *(weight, grad.contiguous(), exp_avg, exp_avg_sq, *optional, factor),
        *(
            lr,
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            weight_decay,
            lr / correction1,
            correction2**0.5,
            size,
        ),
        HAS_ROUNDED=rounded is not None,
        HAS_SKIP=skip is not None,
        HAS_SCALE=scale is not None,
        **constants,
    )


def _step_fake(*_: Any) -> None:
    return None


step = operator("adamw", _step_fake, mutates_args=("weight", "exp_avg", "exp_avg_sq", "rounded"))(_step)


def cases() -> Iterator[Case]:
    """Every kernel that ships, for the check ahead of time."""
    wide, flag = meta(4096, dtype=torch.float32), meta(dtype=torch.float32)
    settings = (1.0, 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05)
    for grad, rounded in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        low = meta(4096, dtype=rounded)
        tensors = (wide, meta(4096, dtype=grad), wide, wide, low, flag, flag)
        yield Case(f"step/{DTYPES[grad]} to {DTYPES[rounded]}", partial(_step, *tensors, *settings))
    yield Case("step/fp32 alone", partial(_step, wide, wide, wide, wide, None, None, None, *settings))
