"""Which belong together, from pairs that do (union-find). The smallest of a set is its root."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_tools.compiled import compiled, inlined


@inlined
def root_of(parents: NDArray[np.int64], item: int) -> int:
    """For compiled loops: the root of an item's set, with the path to it halved."""
    while parents[item] != item:
        parents[item] = parents[parents[item]]
        item = parents[item]
    return item


@compiled
def unite(parents: NDArray[np.int64], firsts: NDArray[np.int64], seconds: NDArray[np.int64]) -> None:
    """Join the sets of firsts[i] and seconds[i]; `parents` [items] starts as 0, 1, 2, …"""
    for pair in range(len(firsts)):
        first, second = root_of(parents, firsts[pair]), root_of(parents, seconds[pair])
        if first < second:
            parents[second] = first
        else:
            parents[first] = second


@compiled
def settle(parents: NDArray[np.int64]) -> None:
    """Make every item's parent its root."""
    for item in range(len(parents)):  # a root is smaller than its items: parents before it are settled
        parents[item] = parents[parents[item]]
