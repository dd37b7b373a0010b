"""Histograms of numbers of any size in fixed bins, which add up over parts and machines."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Steps of a decade: a bin is at most a tenth as wide as its number.
_STEPS = (*range(10, 20), *range(20, 50, 2), *range(50, 100, 5))
_DECADES = range(-5, 9)  # 0.0001 to 10^10; smaller numbers are with 0, larger ones in the last


@cache
def lower_ends() -> tuple[NDArray[np.float64], list[str]]:
    """The lower ends of all bins, ascending, and how they are written."""
    positive = [float(f"{step}e{decade}") for decade in _DECADES for step in _STEPS]
    ends = [*(-end for end in reversed(positive)), 0.0, *positive]
    return np.array(ends), [f"{end:g}" for end in ends]


def binned(values: NDArray[Any]) -> dict[str, int]:
    """How many values each bin has, by its lower end; empty bins and NaN are left out."""
    ends, labels = lower_ends()
    values = values[~np.isnan(values)]
    places = np.searchsorted(ends.astype(values.dtype), values, side="right") - 1
    counts = np.bincount(np.maximum(places, 0))
    return {labels[number]: int(counts[number]) for number in np.flatnonzero(counts).tolist()}


def quantiles_of(bins: dict[str, int], percents: tuple[int, ...]) -> dict[str, float]:
    """The lower end of the bin in which each percentile lies; empty if there is no value."""
    ordered = sorted((float(label), count) for label, count in bins.items())
    reached = np.cumsum([count for _, count in ordered])
    if not ordered:
        return {}
    places = [int(np.searchsorted(reached, reached[-1] * percent / 100)) for percent in percents]
    return {f"{percent}%": ordered[place][0] for percent, place in zip(percents, places, strict=True)}
