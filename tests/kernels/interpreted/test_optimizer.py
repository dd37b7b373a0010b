"""The optimizer's kernels, AdamW and the sum of squares, against the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalite_kernels import adamw_, sum_of_squares
from tests.kernels.helpers import random

SETTINGS: dict[str, Any] = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SIZES = [1, 1000, 1024, 3001]


def _state(size: int, grad: torch.dtype = torch.float32) -> list[Tensor]:
    weight, m, v = (random(size, seed=seed, dtype=torch.float32) for seed in (0, 2, 3))
    return [weight, random(size, seed=1).to(grad), m, v.square()]


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_adamw_is_as_exact_as_its_formula(size: int, grad: torch.dtype) -> None:
    exact = [t.double() for t in _state(size, grad)]
    adamw_(*exact, **SETTINGS, step=7, grad_scale=0.3, impl="reference")
    errors = []
    for impl in ("triton", "reference"):
        state = _state(size, grad)
        rounded = torch.empty(size, dtype=torch.bfloat16)
        adamw_(*state, **SETTINGS, step=7, grad_scale=0.3, rounded=rounded, impl=impl)
        assert torch.equal(rounded, state[0].bfloat16())
        kept = zip((state[0], *state[2:]), (exact[0], *exact[2:]), strict=True)
        errors.append(max(float((a.double() - b).abs().max()) for a, b in kept))
    assert errors[0] <= 2 * errors[1] + 1e-6


@pytest.mark.parametrize("flag", [True, 1, 3.0, torch.inf])
def test_skip_writes_nothing(flag: float) -> None:
    state, rounded = _state(1500), random(1500, seed=4).bfloat16()
    before = [t.clone() for t in (*state, rounded)]
    options: dict[str, Any] = {**SETTINGS, "step": 2, "rounded": rounded, "impl": "triton"}
    adamw_(*state, **options, skip=torch.tensor(flag), grad_scale=3.0)
    assert all(map(torch.equal, (*state, rounded), before))
    adamw_(*state, **options, skip=torch.zeros_like(torch.tensor(flag)), grad_scale=torch.tensor(3.0))
    expected = _state(1500)
    adamw_(*expected, **SETTINGS, step=2, grad_scale=3.0, impl="torch")
    for found, wanted in zip((state[0], *state[2:]), (expected[0], *expected[2:]), strict=True):
        torch.testing.assert_close(found, wanted)


def test_neighbours_of_a_part_stay() -> None:
    whole = _state(3000)
    before = [t.clone() for t in whole]
    adamw_(*(t[100:1500] for t in whole), **SETTINGS, step=1, impl="triton")
    adamw_(*(t[:0] for t in whole), **SETTINGS, step=1, impl="triton")
    for found, old in zip(whole, before, strict=True):
        assert torch.equal(found[:100], old[:100])
        assert torch.equal(found[1500:], old[1500:])
    assert not torch.equal(whole[0][100:1500], before[0][100:1500])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 32_768, 100_001])
def test_sum_of_squares(size: int, dtype: torch.dtype) -> None:
    x = random(size, dtype=dtype)
    found = sum_of_squares(x, impl="triton")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, sum_of_squares(x, impl="reference"), rtol=1e-6, atol=0)


def test_sum_of_squares_of_a_part_and_of_what_is_not_finite() -> None:
    x = random(70_000, dtype=torch.float32)
    torch.testing.assert_close(
        sum_of_squares(x[5:33_000], impl="triton"), x[5:33_000].double().square().sum()
    )
    x[69_999] = torch.nan
    assert sum_of_squares(x, impl="triton").isnan()


def test_operators_keep_their_promises() -> None:
    from megalite_kernels.gpu.adamw import step
    from megalite_kernels.gpu.sum_of_squares import partial_sums

    settings = (1.0, 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05)
    rounded, flag = torch.zeros(100, dtype=torch.bfloat16), torch.tensor(0.0)
    torch.library.opcheck(step, (*_state(100), rounded, flag, torch.tensor(2.0), *settings))
    torch.library.opcheck(step, (*_state(100), None, None, None, *settings))
    torch.library.opcheck(partial_sums, (random(40_000, dtype=torch.float32),))


def test_compiled_whole() -> None:
    def update(state: list[Tensor]) -> Tensor:
        norm = sum_of_squares(state[1], impl="triton").sqrt()
        adamw_(*state, **SETTINGS, step=3, grad_scale=(1 / norm).float(), impl="triton")
        return norm

    found, expected = _state(1500), _state(1500)
    whole = torch.compile(update, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(found), update(expected))
    torch.testing.assert_close(found, expected)
