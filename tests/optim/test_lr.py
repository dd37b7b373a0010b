"""The learning rate's course against its formulas."""

from __future__ import annotations

import math

import pytest

from megalite.config import OptimConfig
from megalite.optim.lr import learning_rate


def test_warm_up_rises_linearly_to_the_peak() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, s, 100) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_ends_at_the_floor_and_never_rises(schedule: str) -> None:
    config = OptimConfig(lr=2.0, warmup_steps=10, schedule=schedule, min_lr_ratio=0.1)  # type: ignore[arg-type]
    rates = [learning_rate(config, s, 110) for s in range(9, 110)]
    assert rates[0] == 2.0
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates, rates[1:], strict=False))
    half = rates[50]
    assert half == pytest.approx(1.1)  # both courses pass the middle of the range half way


def test_cosine_quarter() -> None:
    config = OptimConfig(lr=1.0, min_lr_ratio=0.0)
    assert learning_rate(config, 24, 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_wsd_is_flat_and_then_a_line() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule="wsd", decay_steps=4, min_lr_ratio=0.0)
    rates = [learning_rate(config, s, 10) for s in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_constant() -> None:
    config = OptimConfig(lr=3.0, schedule="constant")
    assert {learning_rate(config, s, 10) for s in range(10)} == {3.0}
