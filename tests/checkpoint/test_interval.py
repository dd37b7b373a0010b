"""The advice on how often to save: Young's optimum, and silence where it would win nothing."""

from __future__ import annotations

import math

import pytest

from megalite.checkpoint.interval import advice, best_interval_s, lost_share


def test_the_best_interval_is_where_least_time_is_lost() -> None:
    for stall_s, mtbf_s in ((0.1, 3.1 * 3600), (6.3, 3.1 * 3600), (0.02, 1e7)):
        best = best_interval_s(stall_s, 0.0, mtbf_s)
        assert best == pytest.approx(math.sqrt(2 * stall_s * mtbf_s))
        least = lost_share(best, stall_s, mtbf_s)
        assert least == pytest.approx(math.sqrt(2 * stall_s / mtbf_s))
        assert all(lost_share(best * k, stall_s, mtbf_s) > least for k in (0.5, 0.9, 1.1, 2.0))
    assert round(best_interval_s(0.1, 0.0, 3.1 * 3600)) == 47
    assert round(best_interval_s(6.3, 0.0, 3.1 * 3600)) == 375


def test_saves_are_not_advised_to_overlap() -> None:
    assert best_interval_s(stall_s=0.1, write_s=600.0, mtbf_s=3.1 * 3600) == 600.0


@pytest.mark.parametrize(
    ("every_steps", "says"),
    [
        (1, "so 6.5% of the time is lost; with checkpoint.every_steps=26 0.5% would be"),
        (7, None),  # too often, but by less than 4 times
        (26, None),
        (100, None),
        (2000, "checkpoint.every_steps=2000 (2,000 s)"),
    ],
)
def test_an_interval_far_from_the_best_is_told(every_steps: int, says: str | None) -> None:
    line = advice(every_steps, step_s=1.0, stall_s=0.065, write_s=1.0, mtbf_s=5200.0)
    assert (line is None) if says is None else (line is not None and says in line)


def test_where_little_is_to_be_won_nothing_is_said() -> None:
    """A small run on one process: 27 times too often costs two minutes in a week."""
    assert advice(every_steps=100, step_s=1.0, stall_s=0.02, write_s=0.1, mtbf_s=1.8e8) is None
