"""AdamW over flat shards against torch.optim.AdamW and its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalite_kernels import adamw_
from megalite_kernels.dispatch import Impl
from tests.kernels.helpers import random

SIZE, STEPS = 1000, 20
SETTINGS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def _gradient(step: int, dtype: torch.dtype) -> Tensor:
    return (random(SIZE, seed=step) * 10.0 ** (step % 5 - 3)).to(dtype)


def _ours(dtype: torch.dtype, grad_scale: float = 1.0) -> list[Tensor]:
    weight, m, v = random(SIZE).to(dtype), torch.zeros(SIZE, dtype=dtype), torch.zeros(SIZE, dtype=dtype)
    for step in range(1, STEPS + 1):
        grad = _gradient(step, dtype) / grad_scale
        adamw_(weight, grad, m, v, **SETTINGS, step=step, grad_scale=grad_scale)
    return [weight, m, v]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_twenty_steps_equal_torchs_optimizer(dtype: torch.dtype, tolerance: float) -> None:
    parameter = torch.nn.Parameter(random(SIZE).to(dtype))
    optimizer = torch.optim.AdamW(
        [parameter], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False, fused=False
    )
    for step in range(1, STEPS + 1):
        parameter.grad = _gradient(step, dtype)
        optimizer.step()
    state = optimizer.state[parameter]
    expected = [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]
    for found, wanted in zip(_ours(dtype), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_the_formula() -> None:
    weight, m, v = random(SIZE), torch.zeros(SIZE).double(), torch.zeros(SIZE).double()
    for t in range(1, STEPS + 1):
        g = _gradient(t, torch.float64)
        m = 0.9 * m + 0.1 * g
        v = 0.95 * v + 0.05 * g * g
        update = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        weight = weight - 3e-3 * (update + 0.1 * weight)
    for found, wanted in zip(_ours(torch.float64), (weight, m, v), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [0.25, 0.3, 17.0])
def test_grad_scale_multiplies_the_gradient(scale: float) -> None:
    for found, wanted in zip(_ours(torch.float32, scale), _ours(torch.float32), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [5, 16, 31, 1015])
def test_an_element_becomes_the_same_wherever_it_lies(size: int) -> None:
    start = [random(2 * SIZE, seed=seed).float() for seed in range(4)]
    start[3].square_()
    for shift in range(16):
        whole = [t.clone() for t in start]
        adamw_(*whole, **SETTINGS, step=3, grad_scale=0.37)
        part = [t[shift : shift + size].clone() for t in start]
        adamw_(*part, **SETTINGS, step=3, grad_scale=0.37)
        for place in (0, 2, 3):
            assert torch.equal(part[place], whole[place][shift : shift + size])


def test_a_shard_in_parts_is_the_shard() -> None:
    whole, parts = (
        [random(SIZE).float(), random(SIZE, seed=1).float(), torch.zeros(SIZE), torch.zeros(SIZE)]
        for _ in range(2)
    )
    adamw_(*whole, **SETTINGS, step=1)
    for low, high in ((0, 333), (333, 334), (334, SIZE)):
        adamw_(*(tensor[low:high] for tensor in parts), **SETTINGS, step=1)
    assert torch.equal(whole[0], parts[0])


def _state() -> list[Tensor]:
    """Weight, gradient and moments in float64."""
    return [random(SIZE), random(SIZE, seed=1), random(SIZE, seed=2), random(SIZE, seed=3).square()]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("flag", [True, 1, 3.0, torch.inf])
def test_skip_writes_nothing(flag: float, impl: Impl) -> None:
    state, rounded = [t.float() for t in _state()], random(SIZE, seed=4).bfloat16()
    before = [t.clone() for t in (*state, rounded)]
    options: dict[str, Any] = {**SETTINGS, "step": 2, "grad_scale": 3.0, "impl": impl, "rounded": rounded}
    adamw_(*state, **options, skip=torch.tensor(flag))
    assert all(map(torch.equal, (*state, rounded), before))
    adamw_(*state, **options, skip=torch.zeros_like(torch.tensor(flag)))
    assert not any(map(torch.equal, (state[0], *state[2:], rounded), (before[0], *before[2:])))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_new_weights_are_rounded_into_the_copy(dtype: torch.dtype, impl: Impl) -> None:
    state, rounded = [t.float() for t in _state()], torch.zeros(SIZE, dtype=dtype)
    adamw_(*state, **SETTINGS, step=1, rounded=rounded, impl=impl)
    assert torch.equal(rounded, state[0].to(dtype))


def test_a_gradient_may_be_bf16_and_its_scale_a_tensor() -> None:
    low, wide = ([t.float() for t in _state()] for _ in range(2))
    low[1] = low[1].bfloat16()
    wide[1] = low[1].float()
    adamw_(*low, **SETTINGS, step=1, grad_scale=torch.tensor(0.25))
    adamw_(*wide, **SETTINGS, step=1, grad_scale=0.25)
    for found, wanted in zip((low[0], *low[2:]), (wide[0], *wide[2:]), strict=True):
        assert torch.equal(found, wanted)


def test_torch_is_as_exact_as_the_formula() -> None:
    exact = _state()
    adamw_(*exact, **SETTINGS, step=7, impl="reference")
    errors = []
    for impl in ("torch", "reference"):
        state = [t.float() for t in _state()]
        adamw_(*state, **SETTINGS, step=7, impl=impl)
        errors.append(torch.stack([(a.double() - b).abs().max() for a, b in zip(state, exact, strict=True)]))
    assert errors[0].max() <= 2 * errors[1].max()
