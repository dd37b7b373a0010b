"""The order of a source's samples, as arithmetic: any place in O(1), nothing that grows with the data.

A full shuffle reads everywhere at once, which a cold disk or a remote store answers slowly. So the
samples stay together in chunks of consecutive ones, read from a few places at a time:

    epoch ─ chunks in a keyed order ─→ windows of a few chunks ─ samples of each in a keyed order ─→ sample

Both orders are keyed permutations of [0, n): a Feistel network (Black and Rogaway 2002, "generalised
Feistel"). An index is written as two digits, and each round adds to one digit a hash of the other,
which is undone by subtracting it, so every round is a bijection. The digits cover slightly more than
n; an index that lands outside walks on along its cycle until it is inside again, which keeps the
whole a bijection of [0, n).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import isqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
MAX_SAMPLES = 2**62  # intermediate sums stay inside uint64
CHUNK_TOKENS = 1 << 17  # 256 KiB of uint16: large against a seek, small against a record batch

Ints = NDArray[np.int64]


@lru_cache(maxsize=1024)
def order_key(seed: int, epoch: int, source: str, use: str = "chunks") -> NDArray[np.uint64]:
    """Round keys, uint64 [ROUNDS], for one use of one epoch of a source, which has a name of its own."""
    name = f"megalite order 2: seed={seed} epoch={epoch} use={use} source={source}"
    digest = hashlib.blake2b(name.encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permute(index: Ints | int, n: int, key: NDArray[np.uint64]) -> Ints:
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


class Layout(Protocol):
    """How a source's samples lie in chunks. `window` is how many chunks are shuffled together."""

    num_samples: int
    window: int

    def epoch(self, key: NDArray[np.uint64]) -> Epoch:
        """One pass over the chunks in the order named by `key`."""


class Epoch(Protocol):
    """One pass over a source, chunk after chunk; `place` counts the samples of the pass."""

    def windows(self, place: Ints) -> tuple[Ints, Ints]:
        """First place and size in samples of the window that holds each place; int64 [n] each."""

    def sample(self, place: Ints) -> Ints:
        """Number in the source of the sample at each place, int64 [n]."""


class EvenChunks:
    """Chunks of `size` samples, but for the last; found by arithmetic.

    Each epoch begins counting at another sample, so that its chunks, and the last short one that closes
    the pass, are not those of the epoch before.
    """

    def __init__(self, num_samples: int, size: int, window: int) -> None:
        self.num_samples, self.size, self.window = num_samples, size, window

    def epoch(self, key: NDArray[np.uint64]) -> Epoch:
        """See `Layout`."""
        return _EvenEpoch(self, key)


class _EvenEpoch:
    def __init__(self, layout: EvenChunks, key: NDArray[np.uint64]) -> None:
        self._layout, self._key = layout, key
        self._full = layout.num_samples // layout.size
        self._shift = int(key[0] % np.uint64(layout.num_samples))

    def windows(self, place: Ints) -> tuple[Ints, Ints]:
        width = self._layout.window * self._layout.size
        first = place - place % width
        return first, np.minimum(width, self._layout.num_samples - first)

    def sample(self, place: Ints) -> Ints:
        size = self._layout.size
        slot, inside = np.divmod(place, size)
        is_full = slot < self._full
        if self._full:
            slot[is_full] = permute(slot[is_full], self._full, self._key)
        samples: Ints = (slot * size + inside + self._shift) % self._layout.num_samples
        return samples


class CountedChunks:
    """Chunks of the given numbers of samples, int64 [chunks]; an epoch costs one sum over them."""

    def __init__(self, counts: Ints, window: int) -> None:
        self.first = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        self.counts, self.window = counts, window
        self.num_samples = int(self.first[-1])

    def epoch(self, key: NDArray[np.uint64]) -> Epoch:
        """See `Layout`."""
        return _CountedEpoch(self, key)


class _CountedEpoch:
    def __init__(self, layout: CountedChunks, key: NDArray[np.uint64]) -> None:
        self._layout = layout
        self._chunk = permute(np.arange(len(layout.counts)), len(layout.counts), key)
        self._ends = np.cumsum(layout.counts[self._chunk])
        last = [layout.num_samples]
        window_ends = np.concatenate([self._ends[layout.window - 1 : -1 : layout.window], last])
        self._window_edges = np.concatenate([[0], window_ends])

    def windows(self, place: Ints) -> tuple[Ints, Ints]:
        window = np.searchsorted(self._window_edges, place, side="right") - 1
        first = self._window_edges[window]
        return first, self._window_edges[window + 1] - first

    def sample(self, place: Ints) -> Ints:
        slot = np.searchsorted(self._ends, place, side="right")
        chunk = self._chunk[slot]
        inside = place - (self._ends[slot] - self._layout.counts[chunk])
        samples: Ints = self._layout.first[chunk] + inside
        return samples


class Order:
    """Which sample of a source is its n-th, for n without end: each epoch has an order of its own.

    `source` names the data, so a source keeps its order when others join or leave.
    """

    def __init__(self, layout: Layout, seed: int, source: str, shuffle: bool = True) -> None:
        self.layout = layout
        self._seed, self._source, self._shuffle = seed, source, shuffle
        self._epoch = lru_cache(maxsize=2)(lambda epoch: layout.epoch(order_key(seed, epoch, source)))

    def sample(self, n: Ints) -> Ints:
        """Number in the source of its n-th sample; int64 [n] to int64 [n]."""
        epochs, places = np.divmod(n, self.layout.num_samples)
        if not self._shuffle:
            return places
        result = np.empty_like(places)
        for epoch in _distinct(epochs):
            mine = epochs == epoch
            result[mine] = self._in_epoch(epoch, places[mine])
        return result

    def _in_epoch(self, number: int, place: Ints) -> Ints:
        epoch = self._epoch(number)
        first, size = epoch.windows(place)
        for start in _distinct(first):
            mine = np.flatnonzero(first == start)
            key = order_key(self._seed, number, self._source, f"window at {start}")
            place[mine] = start + permute(place[mine] - start, int(size[mine[0]]), key)
        return epoch.sample(place)


def _distinct(values: Ints) -> list[int]:
    return sorted(set(values.tolist()))


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
