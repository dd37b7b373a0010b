"""Which keys occur again after their first place in the corpus, from records of key and address."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_tools.compiled import compiled

COLUMNS = 3  # a record: two halves of a 128-bit key, an address


def later_occurrences(records: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every record whose key has an earlier address, as (its address, the earliest), in order of address.

    Shapes:  records uint64 [records, 3]; returns uint64 [later, 2]
    """
    order = np.argsort(records[:, 0])
    out = np.empty((len(records), 2), dtype=np.uint64)
    found = out[: _later(records, order, out)]
    return found[np.argsort(found[:, 0])]


@compiled
def _later(records: NDArray[np.uint64], order: NDArray[np.int64], out: NDArray[np.uint64]) -> int:
    """Fill `out`; how many. `order` sorts the records by the first half of their keys."""
    count = start = 0
    while start < len(order):
        stop = start + 1
        key = records[order[start], 0]
        while stop < len(order) and records[order[stop], 0] == key:
            stop += 1
        while stop - start > 1:  # nearly always one second half among them: gather those of the first
            second = records[order[start], 1]
            same, earliest = start, records[order[start], 2]
            for place in range(start, stop):
                index = order[place]
                if records[index, 1] == second:
                    order[place], order[same] = order[same], index
                    same += 1
                    earliest = min(earliest, records[index, 2])
            for place in range(start, same):
                address = records[order[place], 2]
                if address != earliest:
                    out[count, 0], out[count, 1] = address, earliest
                    count += 1
            start = same
        start = stop
    return count
