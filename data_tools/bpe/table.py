"""A table from short byte strings to token ids, for compiled loops: open addressing, every hit verified.

A slot is four uint64: two words of the key, its size with where it lies in the arena, and its ids. A key of
up to 16 bytes is its two words; of a longer one they are a hash, and its bytes are compared in the arena.
A slot of size 0 is free.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.compiled import compiled

PADDING = 16  # bytes that must be readable after the last key
MAX_KEY_BYTES = 64  # longer strings hardly ever come back

_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)  # odd, of no pattern


class Table(NamedTuple):
    """Shapes:  slots uint64 [a power of two, 4]; arena uint8 [bytes]; ids int32 [ids];
    used int64 [3]: slots, bytes of the arena, ids
    """

    slots: NDArray[np.uint64]
    arena: NDArray[np.uint8]
    ids: NDArray[np.int32]
    used: NDArray[np.int64]


def empty_table(slots: int, arena_bytes: int, ids: int) -> Table:
    """A table of so many slots, a power of two; it is full when half of them are used."""
    return Table(
        np.zeros((slots, 4), np.uint64),
        np.zeros(arena_bytes + PADDING, np.uint8),
        np.zeros(ids, np.int32),
        np.zeros(3, np.int64),
    )


@compiled
def signed(number: Any) -> int:
    """As int64: what is counted must be neither a literal, which is compiled for once more, nor unsigned."""
    return np.int64(number)  # type: ignore[return-value]


@compiled
def eight(data: NDArray[np.uint8], at: np.uint64) -> np.uint64:
    """Eight bytes from a place on, as a little-endian number; the compiler makes one load of it."""
    word = np.uint64(data[at])
    word |= np.uint64(data[at + np.uint64(1)]) << np.uint64(8)
    word |= np.uint64(data[at + np.uint64(2)]) << np.uint64(16)
    word |= np.uint64(data[at + np.uint64(3)]) << np.uint64(24)
    word |= np.uint64(data[at + np.uint64(4)]) << np.uint64(32)
    word |= np.uint64(data[at + np.uint64(5)]) << np.uint64(40)
    word |= np.uint64(data[at + np.uint64(6)]) << np.uint64(48)
    word |= np.uint64(data[at + np.uint64(7)]) << np.uint64(56)
    return word


@compiled
def key_words(data: NDArray[np.uint8], start: int, size: int) -> tuple[np.uint64, np.uint64]:
    """The two words of a key of at least one byte."""
    at = np.uint64(start)
    first = eight(data, at)
    if size <= 8:
        return first & _kept(size), np.uint64(0)
    second = eight(data, at + np.uint64(8))
    if size <= 16:
        return first, second & _kept(size - 8)
    done = 16
    while done < size:
        word = eight(data, at + np.uint64(done))
        if done + 8 > size:
            word &= _kept(size - done)
        first = (first ^ word) * _FIRST
        second = (second + word) * _SECOND
        first ^= first >> np.uint64(29)
        second ^= second >> np.uint64(31)
        done += 8
    return first, second


@compiled
def _kept(size: int) -> np.uint64:
    """A mask of so many low bytes, 1 to 8."""
    return np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - 8 * size)


@compiled
def find(
    slots: NDArray[np.uint64],
    arena: NDArray[np.uint8],
    data: NDArray[np.uint8],
    start: int,
    size: int,
    first: np.uint64,
    second: np.uint64,
) -> int:
    """The slot of the key data[start : start + size] with these words, or the free slot that is its place."""
    mask = np.uint64(slots.shape[0] - 1)
    mixed = (first ^ (second * _SECOND) ^ np.uint64(size)) * _FIRST
    place = (mixed ^ (mixed >> np.uint64(32))) & mask
    while True:
        head = slots[place, 2]
        if head == 0:
            break
        if (
            slots[place, 0] == first
            and slots[place, 1] == second
            and signed(head & np.uint64(0xFFFF)) == size
            and (size <= 16 or _is_equal(arena, signed(head >> np.uint64(16)), data, start, size))
        ):
            break
        place = (place + np.uint64(1)) & mask
    return signed(place)


@compiled
def _is_equal(arena: NDArray[np.uint8], offset: int, data: NDArray[np.uint8], start: int, size: int) -> bool:
    for i in range(size):  # noqa: SIM110
        if arena[offset + i] != data[start + i]:
            return False
    return True


@compiled
def put(
    slots: NDArray[np.uint64],
    arena: NDArray[np.uint8],
    ids: NDArray[np.int32],
    used: NDArray[np.int64],
    data: NDArray[np.uint8],
    start: int,
    size: int,
    first: np.uint64,
    second: np.uint64,
    found: NDArray[np.int32],
    count: int,
) -> None:
    """Enter a key that is not in the table with its first `count` ids; a full table is emptied before."""
    if 2 * used[0] >= slots.shape[0] or used[1] + size > arena.size or used[2] + count > ids.size:
        for slot in range(slots.shape[0]):
            slots[slot, 2] = 0
        for kind in range(3):
            used[kind] = 0
    place = find(slots, arena, data, start, size, first, second)
    offset = 0
    if size > 16:
        offset = used[1]
        for i in range(size):
            arena[offset + i] = data[start + i]
        used[1] += size
    value = signed(found[0])
    if count > 1:
        value = used[2]
        for i in range(count):
            ids[value + i] = found[i]
        used[2] += count
    slots[place, 0] = first
    slots[place, 1] = second
    slots[place, 2] = np.uint64(size) | (np.uint64(offset) << np.uint64(16))
    slots[place, 3] = np.uint64(count) | (np.uint64(value) << np.uint64(16))
    used[0] += 1
