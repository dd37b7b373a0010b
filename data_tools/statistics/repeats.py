"""What repeats within a document: equal items, and n-grams of words. For compiled loops, over hashes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_tools.compiled import compiled
from data_tools.statistics.hashing import joined, slot_of, slots_for

TOP_NGRAMS = (2, 3, 4)
DUPLICATE_NGRAMS = (5, 6, 7, 8, 9, 10)
_SHORTEST, _LONGEST_TOP, _LONGEST = TOP_NGRAMS[0], TOP_NGRAMS[-1], DUPLICATE_NGRAMS[-1]

_SEEN = -1


@compiled
def duplicates(items: NDArray[np.uint64], chars: NDArray[np.int64]) -> tuple[int, int]:
    """How many items equal an earlier one, and how many characters these have."""
    keys = np.zeros(slots_for(items.size), np.uint64)
    count = size = 0
    for number in range(items.size):
        slot = slot_of(keys, items[number])
        if keys[slot]:
            count += 1
            size += chars[number]
        keys[slot] = items[number]
    return count, size


@compiled
def repeated_ngrams(words: NDArray[np.uint64], ends: NDArray[np.int64], out: NDArray[np.float64]) -> None:
    """Characters in repeated n-grams of a document's words: out[n - 2] for n = 2 … 10.

    2 … 4:   those of the n-gram that is most frequent, times how often it is; of equally frequent ones the
             first; words are joined by one space, as datatrove counts
    5 … 10:  those of n-grams that were there before, without spaces. After one is found, looking goes on
             behind it, so that no character counts twice (Rae et al. 2021, section A.1.1)

    Only where an n-gram repeats can a longer one repeat: each n looks at the places n - 1 has left.
    """
    left = words.size
    grams, places, slots = np.empty(left, np.uint64), np.empty(left, np.int64), np.empty(left, np.int64)
    for place in range(left):
        grams[place], places[place] = words[place], place
    for n in range(_SHORTEST, _LONGEST + 1):
        keys, counts = np.zeros(slots_for(left), np.uint64), np.zeros(slots_for(left), np.int32)
        found = 0
        for number in range(left):
            place = places[number]
            if place + n <= words.size:
                gram = joined(grams[place], words[place + n - 1])
                slot = slot_of(keys, gram)
                keys[slot] = grams[place] = gram
                counts[slot] += 1
                places[found], slots[found] = place, slot
                found += 1
        if n <= _LONGEST_TOP:
            best, where = 1, 0
            for number in range(found):
                if counts[slots[number]] > best:
                    best, where = counts[slots[number]], places[number]
            out[n - _SHORTEST] = best * (ends[where + n] - ends[where] + n - 1) if n <= words.size else 0
        left = 0
        for number in range(found):
            if counts[slots[number]] > 1:
                places[left], slots[left] = places[number], slots[number]
                left += 1
        if n > _LONGEST_TOP:
            chars = free = 0
            for number in range(left):
                place = places[number]
                if place >= free:
                    if counts[slots[number]] == _SEEN:
                        chars += ends[place + n] - ends[place]
                        free = place + n
                    counts[slots[number]] = _SEEN
            out[n - _SHORTEST] = chars
