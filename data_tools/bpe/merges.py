"""Exact byte-pair merges of one pre-token: always the pair of lowest rank, the leftmost of equals.

O(n log n) by a heap of rank and place; entries that the text has outrun are passed over, so that a word
of a million letters is no trouble.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.bpe.table import signed
from data_tools.compiled import compiled

_NONE = np.uint64(0xFFFFFFFFFFFFFFFF)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Merges(NamedTuple):
    """What a byte-level BPE knows.

    Shapes:  byte_ids int32 [256]: the id of each byte; pairs uint64 [a power of two, 2], open addressing:
             left id << 32 | right id → rank << 32 | merged id
    """

    byte_ids: NDArray[np.int32]
    pairs: NDArray[np.uint64]


def build_merges(byte_ids: NDArray[np.int32], rules: NDArray[np.int64]) -> Merges:
    """From rules int64 [merges, 3] of left, right and merged id, in order of rank. Later repeats win."""
    size = 1 << max(4, int(2 * len(rules)).bit_length())
    pairs = np.full((size, 2), _NONE)
    _enter(pairs, rules)
    return Merges(byte_ids, pairs)


@compiled
def _enter(pairs: NDArray[np.uint64], rules: NDArray[np.int64]) -> None:
    for rank in range(rules.shape[0]):
        key = (np.uint64(rules[rank, 0]) << np.uint64(32)) | np.uint64(rules[rank, 1])
        place = _place(pairs, key)
        pairs[place, 0] = key
        pairs[place, 1] = (np.uint64(rank) << np.uint64(32)) | np.uint64(rules[rank, 2])


@compiled
def _place(pairs: NDArray[np.uint64], key: np.uint64) -> np.uint64:
    mask = np.uint64(pairs.shape[0] - 1)
    mixed = key * _MULTIPLIER
    place = (mixed ^ (mixed >> np.uint64(32))) & mask
    while pairs[place, 0] != key and pairs[place, 0] != _NONE:
        place = (place + np.uint64(1)) & mask
    return place


@compiled
def _rule(pairs: NDArray[np.uint64], left: int, right: int) -> np.uint64:
    """rank << 32 | merged id of a pair, _NONE if it does not merge."""
    rule: np.uint64 = pairs[_place(pairs, (np.uint64(left) << np.uint64(32)) | np.uint64(right)), 1]
    return rule


@compiled
def merge(
    data: NDArray[np.uint8],
    start: int,
    size: int,
    byte_ids: NDArray[np.int32],
    pairs: NDArray[np.uint64],
    links: NDArray[np.int32],
    heap: NDArray[np.uint64],
    ids: NDArray[np.int32],
) -> int:
    """Write the ids of data[start : start + size], return how many.

    Shapes:  work space: links [2, ≥ size], heap [≥ 3 · size]; ids [≥ size]
    """
    before, after = links[0], links[1]
    for i in range(size):
        ids[i] = byte_ids[data[start + i]]
        before[i] = i - 1
        after[i] = i + 1
    waiting = signed(0)
    for i in range(size - 1):
        waiting = _offer(heap, waiting, pairs, ids[i], ids[i + 1], i)
    while waiting:
        top = heap[0]
        waiting = _pop(heap, waiting)
        at = signed(top & _LOW)
        right = signed(after[at])
        # The pair that was entered may have been merged away, or be another by now.
        if ids[at] < 0 or right >= size:
            continue
        rule = _rule(pairs, ids[at], ids[right])
        if rule == _NONE or (rule ^ top) >> _HALF:
            continue
        ids[at] = np.int32(rule & _LOW)
        ids[right] = -1
        following = after[right]
        after[at] = following
        if following < size:
            before[following] = at
            waiting = _offer(heap, waiting, pairs, ids[at], ids[following], at)
        if at > 0:
            left = signed(before[at])
            waiting = _offer(heap, waiting, pairs, ids[left], ids[at], left)
    count = 0
    at = 0
    while at < size:
        ids[count] = ids[at]
        count += 1
        at = after[at]
    return count


@compiled
def _offer(
    heap: NDArray[np.uint64], waiting: int, pairs: NDArray[np.uint64], left: int, right: int, at: int
) -> int:
    """Enter a pair into a binary heap if it merges; how many entries there are now."""
    rule = _rule(pairs, left, right)
    if rule == _NONE:
        return waiting
    entry = (rule & ~_LOW) | np.uint64(at)
    place = waiting
    while place > 0 and entry < heap[(place - 1) >> 1]:
        heap[place] = heap[(place - 1) >> 1]
        place = (place - 1) >> 1
    heap[place] = entry
    return waiting + 1


@compiled
def _pop(heap: NDArray[np.uint64], waiting: int) -> int:
    """Remove the least entry; how many are left."""
    waiting -= 1
    entry = heap[waiting]
    place = 0
    while True:
        child = 2 * place + 1
        if child >= waiting:
            break
        if child + 1 < waiting and heap[child + 1] < heap[child]:
            child += 1
        if entry <= heap[child]:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = entry
    return waiting
