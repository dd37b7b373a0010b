"""A refused step computed again: the same numbers blame the data, other numbers blame a processor.

A step is a pure function of weights and batch, dropout included, so a second run must repeat it. What
a rank reports is its own share of the loss and of the squared gradient norm.

Source:  the three verdicts follow Megatron-core's rerun state machine (transient, persistent, correct)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Shares = Sequence[tuple[float, float]]  # (loss, squared gradient norm) of every rank
Cause = Literal["data", "transient", "persistent"]

# Deterministic kernels repeat every bit; the summation order of some libraries' does not.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Blame:
    """Why a step came out wild, and the ranks whose numbers changed from run to run."""

    cause: Cause
    ranks: tuple[int, ...] = ()


def changed_ranks(before: Shares, after: Shares) -> tuple[int, ...]:
    """Ranks whose loss share differs between two runs; if none does, whose share of the gradient norm.

    An error in the forward pass shows in the loss of the rank that made it. One in the backward pass has
    been summed over the ranks by the time it shows: then these are the ranks that hold a wrong gradient.
    """
    for part in (0, 1):
        found = tuple(
            rank
            for rank, (old, new) in enumerate(zip(before, after, strict=True))
            if not _is_same(old[part], new[part])
        )
        if found:
            return found
    return ()


def blame(first: Shares, second: Shares, third: Shares | None = None) -> Blame:
    """What three runs of one step tell; the third is only asked for when the first two differ."""
    changed = changed_ranks(first, second)
    if not changed:
        return Blame("data")
    if third is None:
        raise ValueError("the first two runs differ; a third must tell which of them was right")
    still = changed_ranks(second, third)
    agrees = not still or not changed_ranks(first, third)
    return Blame("transient", changed) if agrees else Blame("persistent", still)


def _is_same(a: float, b: float) -> bool:
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return a == b or math.isclose(a, b, rel_tol=_TOLERANCE)
