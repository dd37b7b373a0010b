"""The order of samples, as arithmetic: no stored index, no start-up cost, any place in O(1).

A keyed permutation of [0, n) is a Feistel network (Black and Rogaway 2002, "generalised Feistel"):
an index is written as two digits, and each round adds to one digit a hash of the other, which is
undone by subtracting it, so every round is a bijection. The digits cover slightly more than n;
an index that lands outside walks on along its cycle until it is inside again, which keeps the
whole a bijection of [0, n).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
MAX_SAMPLES = 2**62  # intermediate sums stay inside uint64


@lru_cache(maxsize=256)
def order_key(seed: int, epoch: int, source: int) -> NDArray[np.uint64]:
    """Round keys, uint64 [ROUNDS], of one epoch of one source (its place in the list of sources)."""
    name = f"megalite order 1: seed={seed} epoch={epoch} source={source}"
    digest = hashlib.blake2b(name.encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permute(index: NDArray[np.int64] | int, n: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each index of [0, n) goes under the permutation named by `key`.

    Shapes:  index int64 of any shape, or one int; returns int64 of the same shape
    Raises:  IndexError if an index is outside [0, n) or n is not in [1, 2^62]
    """
    indices = np.asarray(index, dtype=np.int64)
    outside = indices.size and (int(indices.min()) < 0 or int(indices.max()) >= n)
    if outside or not 1 <= n <= MAX_SAMPLES:
        raise IndexError(f"index {index} is not in [0, {n}), or n is not in [1, 2^62]")
    width = isqrt(n - 1) + 1  # width · height ≥ n, and less than width beyond it
    height = -(-n // width)
    result = _rounds(indices.astype(np.uint64).ravel(), width, height, key)
    while (walking := np.flatnonzero(result >= np.uint64(n))).size:
        result[walking] = _rounds(result[walking], width, height, key)
    return result.astype(np.int64).reshape(indices.shape)


def _rounds(x: NDArray[np.uint64], width: int, height: int, key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    high, low = np.divmod(x, np.uint64(width))
    for first, second in key.reshape(-1, 2):
        low = (low + _mix(high ^ first) % np.uint64(width)) % np.uint64(width)
        high = (high + _mix(low ^ second) % np.uint64(height)) % np.uint64(height)
    result: NDArray[np.uint64] = high * np.uint64(width) + low
    return result


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014); wraps modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
