"""What every way of packing documents into samples offers, and the plain one: end to end, then cut."""

from __future__ import annotations

from bisect import bisect_right
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megalite.data.batch import Rows
from megalite.data.order import CHUNK_TOKENS, EvenChunks, Layout
from megalite.data.shards import Dataset
from megalite.errors import DataError

Ints = NDArray[np.int64]


class Packing(Protocol):
    """How a dataset's documents become samples, and how these lie in chunks."""

    layout: Layout

    def fill(self, sample: int, rows: Rows, row: int) -> None:
        """Read a sample into one of `rows`, the next.

        Raises:  CorruptBlockError if one of its record batches is damaged
        """

    def blocks(self, samples: Ints) -> Ints:
        """Numbers of the record batches that hold these samples, ascending."""


class Concat:
    """Sample k is the tokens [k·seq_len, k·seq_len + seq_len] of the stream, the last as a label only.

    Raises:  DataError if the dataset has no whole sample
    """

    layout: Layout

    def __init__(self, dataset: Dataset, seq_len: int, window: int) -> None:
        samples = (dataset.total_tokens - 1) // seq_len
        if samples < 1:
            raise DataError(
                f"{dataset.path} has {dataset.total_tokens} tokens, one sample of data.seq_len={seq_len} "
                f"needs {seq_len + 1}; shorten seq_len or give more text"
            )
        self.layout = EvenChunks(samples, max(1, CHUNK_TOKENS // seq_len), window)
        self._dataset, self._seq_len = dataset, seq_len
        self._ends: list[int] = dataset.block_ends.tolist()  # bisect is fastest on a list

    def fill(self, sample: int, rows: Rows, row: int) -> None:
        """See `Packing`."""
        out, ends = rows.stream[row], self._ends
        position = sample * self._seq_len
        stop = position + self._seq_len + 1
        number = bisect_right(ends, position)
        block, end = self._dataset.block(number), ends[number]
        starts, masks, filled = [], [], 0
        while True:
            low = position - end + block.tokens.size
            high = min(stop, end) - end + block.tokens.size
            out[filled : filled + high - low] = block.tokens[low:high]
            # Documents that begin after the row's first token, up to the token that is a label only. The
            # last offset begins the next block's first document.
            offsets = block.offsets.data  # a memoryview, whose items bisect reads faster than the array's
            first = bisect_right(offsets, low)
            last = bisect_right(offsets, high - 1 if stop <= end else high, first)
            starts.append(block.offsets[first:last] - np.int32(low - filled))
            if block.loss_mask is not None:
                masks.append(block.loss_mask[low:high])
            filled += high - low
            if stop <= end:
                break
            number, position = number + 1, end
            block, end = self._dataset.block(number), ends[number]
        rows.starts.append(starts[0] if len(starts) == 1 else np.concatenate(starts))
        if masks:
            rows.loss_masks.append((row, np.concatenate(masks)))

    def blocks(self, samples: Ints) -> Ints:
        """See `Packing`."""
        first = np.searchsorted(self._dataset.block_ends, samples * self._seq_len, side="right")
        last = np.searchsorted(self._dataset.block_ends, (samples + 1) * self._seq_len, side="right")
        return distinct_in_ranges(first, last)


def distinct_in_ranges(first: Ints, last: Ints) -> Ints:
    """Ascending numbers that lie in any of the closed ranges [first, last], int64."""
    longest = int((last - first).max(initial=0)) + 1
    numbers = np.minimum(first[:, None] + np.arange(longest), last[:, None])
    return np.array(sorted(set(numbers.ravel().tolist())), dtype=np.int64)
