"""The squared norm of flat buffers."""

from __future__ import annotations

import pytest
import torch

from megalite_kernels import sum_of_squares
from tests.kernels.helpers import random


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 12_289, 300_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_formula(size: int, dtype: torch.dtype) -> None:
    x = random(size, dtype=dtype)
    found, expected = sum_of_squares(x, impl="torch"), sum_of_squares(x, impl="reference")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=4e-6, atol=0)


def test_millions_of_equal_elements_are_all_counted() -> None:
    x = torch.ones(1 << 25)  # a running sum in fp32 stops at half of them
    assert sum_of_squares(x, impl="torch") == x.numel()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_shows(value: float) -> None:
    for place in (0, 5000, 8191):
        x = torch.ones(8192)
        x[place] = value
        assert not sum_of_squares(x, impl="torch").isfinite()


def test_runs_are_added_in_float64() -> None:
    x = torch.zeros(3 * 4096)
    x[0], x[4096], x[-1] = 2.0**13, 1, 1
    assert sum_of_squares(x, impl="torch").item() == 2**26 + 2
