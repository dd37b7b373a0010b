"""Which cases of a parametrised test run every day, and which before a change lands."""

from __future__ import annotations

from typing import Any

import pytest


def one_a_day(first: Any, *others: Any) -> list[Any]:
    """Arguments for `pytest.mark.parametrize`, all but the first marked slow."""
    marked = [case if isinstance(case, tuple) else (case,) for case in others]
    return [first, *(pytest.param(*case, marks=pytest.mark.slow) for case in marked)]
