"""64-bit hashes of words, lines and sequences of them, and tables of such hashes, for compiled loops."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_tools.compiled import compiled, inlined

START = np.uint64(0xCBF29CE484222325)  # the hash of nothing yet
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits look random
_TURN = np.uint64(0xD6E8FEB86659FD93)
_HALF, _ODD = np.uint64(32), np.uint64(1)


@inlined
def extended(value: np.uint64, item: np.uint64) -> np.uint64:
    """The hash of a string and one more character or byte."""
    return (value ^ item) * _FACTOR


@inlined
def finished(value: np.uint64) -> np.uint64:
    """The hash at a string's end: every bit depends on all that came before. Odd, as 0 marks a free slot."""
    value = (value ^ (value >> _HALF)) * _FACTOR
    return (value ^ (value >> _HALF)) | _ODD


@inlined
def joined(before: np.uint64, after: np.uint64) -> np.uint64:
    """The hash of a sequence of finished hashes and one more. Odd."""
    return ((before * _TURN + after) * _FACTOR) | _ODD  # the turn, as a sum alone forgets the order


@inlined
def slots_for(number: int) -> int:
    """How many slots a table for so many keys has: a power of two, at most half of it taken."""
    size = 2
    while size < 2 * number:
        size *= 2
    return size


@inlined
def slot_of(keys: NDArray[np.uint64], key: np.uint64) -> int:
    """Where a key is in a table, or the free slot (0) where it belongs; a key is not 0."""
    at = int(key >> _HALF) & (keys.size - 1)
    while keys[at] != 0 and keys[at] != key:
        at = (at + 1) & (keys.size - 1)
    return at


@compiled
def table_of(
    hashes: NDArray[np.uint64], bits: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """A table of keys and, for each, the union of its bits; read with `slot_of`."""
    keys = np.zeros(slots_for(2 * hashes.size), np.uint64)
    values = np.zeros(keys.size, np.uint64)
    for number in range(hashes.size):
        slot = slot_of(keys, hashes[number])
        keys[slot] = hashes[number]
        values[slot] |= bits[number]
    return keys, values


def readonly(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A view as Arrow gives: compiled loops are compiled anew for arrays that may be written to."""
    view = data.view()
    view.setflags(write=False)
    return view
