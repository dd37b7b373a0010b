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

OPEN_BLOCKS = 192  # record batches in use at once; fewer than a dataset keeps open

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

    def pieces(self, sample: int) -> list[tuple[int, int, int]]:
        """What a sample is made of: (record batch, start, stop) for each run of its tokens."""


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
        # A few µs a row: a thousandth more here is a thousandth less of all the loader can read.
        position = sample * self._seq_len
        number = bisect_right(self._ends, position)
        block = self._dataset.block(number)
        tokens, places = block.tokens, block.places
        size = len(tokens)
        low = position - self._ends[number] + size
        last = low + self._seq_len
        if last >= size:
            self._fill_across(number, low, rows, row)
            return
        rows.stream[row] = tokens[low : last + 1]
        if rows.masked:
            # Documents that begin after the row's first token, up to the token that is a label only.
            first = bisect_right(places, low)
            stop = bisect_right(places, last, first)
            if stop > first:
                rows.mark_documents(row, block.offsets[first:stop], low)
        if block.loss_mask is not None:
            rows.mask_loss(row, block.loss_mask[low : last + 1])

    def _fill_across(self, number: int, low: int, rows: Rows, row: int) -> None:
        """`fill` from place `low` of a block on into those after it."""
        out = rows.stream[row]
        opened = [self._dataset.block(number)]
        filled = opened[0].tokens[low:].size
        while filled < out.size:  # all are opened first, so that a damaged one leaves nothing half done
            opened.append(self._dataset.block(number + len(opened)))
            filled += opened[-1].tokens.size
        counts = None
        filled = -low
        for block in opened:
            begin, end = max(filled, 0), min(filled + block.tokens.size, out.size)
            out[begin:end] = block.tokens[begin - filled : end - filled]
            if rows.masked:
                # The last offset is where the next block begins.
                first = bisect_right(block.places, -filled)
                stop = bisect_right(block.places, out.size - 1 - filled, first)
                rows.mark_documents(row, block.offsets[first:stop], -filled)
            if block.loss_mask is not None:
                counts = np.ones(out.size, dtype=np.bool_) if counts is None else counts
                counts[begin:end] = block.loss_mask[begin - filled : end - filled]
            filled += block.tokens.size
        if counts is not None:
            rows.mask_loss(row, counts)

    def blocks(self, samples: Ints) -> Ints:
        """See `Packing`."""
        first = np.searchsorted(self._dataset.block_ends, samples * self._seq_len, side="right")
        last = np.searchsorted(self._dataset.block_ends, (samples + 1) * self._seq_len, side="right")
        return distinct_in_ranges(first, last)

    def pieces(self, sample: int) -> list[tuple[int, int, int]]:
        """See `Packing`."""
        position, stop = sample * self._seq_len, (sample + 1) * self._seq_len
        found = []
        for number in self.blocks(np.array([sample])).tolist():
            begin = self._ends[number - 1] if number else 0
            low, high = max(position, begin), min(stop, self._ends[number])
            if low < high:
                found.append((number, low - begin, high - begin))
        return found


def distinct_in_ranges(first: Ints, last: Ints) -> Ints:
    """Ascending numbers that lie in any of the closed ranges [first, last], int64."""
    longest = int((last - first).max(initial=0)) + 1
    numbers = np.minimum(first[:, None] + np.arange(longest), last[:, None])
    return np.array(sorted(set(numbers.ravel().tolist())), dtype=np.int64)
