"""Rows of a token stream to the arrays a model takes: tokens, labels, positions, document starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

IGNORE = -100  # label of a token whose successor is not to be predicted
FEW = 64  # tokens a document below which filling runs one by one is slower than repeating

Ints = NDArray[np.int64]
Allocate = Callable[[tuple[int, ...], DTypeLike], NDArray[Any]]


class Replacement(NamedTuple):
    """A sample that could not be read, and why; another of its source was read in its place."""

    sample_id: int
    file: str
    batch: int
    reason: str


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what is to be predicted from them.

    Shapes, all [rows, seq] but the last three:
        tokens      int64
        labels      int64: the next token of the stream; IGNORE where that belongs to another document, is
                    padding, or does not count for the loss
        positions   int64: counted from the start of the document, or of the row if it began earlier
        doc_starts  int32: place in the row of the first token of each token's document
        sample_ids  int64 [rows]: global sample index; where samples are cut into r rows, r · index + 0 … r − 1
        cu_seqlens  int32 [documents + 1]: where documents begin and end with all rows laid end to end; a row
                    begins one, and so does its padding
        replaced    the samples that others stand for
    Without document masks positions count the row, doc_starts is None and cu_seqlens has the rows.
    """

    tokens: Ints
    labels: Ints
    positions: Ints
    doc_starts: NDArray[np.int32] | None
    sample_ids: Ints
    cu_seqlens: NDArray[np.int32]
    replaced: tuple[Replacement, ...] = ()


class Rows:
    """Samples of `seq_len` tokens on their way into a batch. Whoever reads fills one row after the other.

    Shapes:  stream uint16|uint32 [samples, seq_len + 1], the last column for labels only; starts: for each
             sample the places in (0, seq_len] where documents begin, ascending
    """

    def __init__(self, samples: int, seq_len: int, dtype: DTypeLike) -> None:
        self.seq_len = seq_len
        self.stream: NDArray[Any] = np.empty((samples, seq_len + 1), dtype=dtype)
        self.starts: list[NDArray[np.int32]] = []
        self.padding: list[tuple[int, int]] = []  # (sample, first place that holds nothing)
        self.loss_masks: list[tuple[int, NDArray[np.bool_]]] = []  # (sample, bool [seq_len + 1])

    def batch(
        self,
        sample_ids: Ints,
        row_len: int,
        document_mask: bool,
        replaced: tuple[Replacement, ...],
        allocate: Allocate,
    ) -> Batch:
        """The arrays of these samples, each cut into rows of `row_len`, made by `allocate`."""
        samples, size = len(self.stream), self.stream.shape[0] * self.seq_len
        tokens = allocate((samples, self.seq_len), np.int64)
        labels = allocate((samples, self.seq_len), np.int64)
        tokens[...] = self.stream[:, :-1]
        labels[...] = self.stream[:, 1:]
        starts = self._flat_starts() if document_mask else np.empty(0, dtype=np.int64)
        labels.ravel()[starts - 1] = IGNORE
        for sample, used in self.padding:
            labels[sample, used - 1 :] = IGNORE
        for sample, mask in self.loss_masks:
            labels[sample, ~mask[1:]] = IGNORE
        if row_len < self.seq_len:
            pieces = self.seq_len // row_len
            sample_ids = (sample_ids[:, None] * pieces + np.arange(pieces)).ravel()
        shape = (size // row_len, row_len)
        if document_mask:
            cu_seqlens = _merge(starts, size, row_len)
            positions, doc_starts = _places(cu_seqlens, shape, allocate)
        else:
            cu_seqlens = np.arange(0, size + 1, row_len, dtype=np.int32)
            positions, doc_starts = _row_places(shape), None
        return Batch(
            tokens.reshape(shape),
            labels.reshape(shape),
            positions,
            doc_starts,
            sample_ids,
            cu_seqlens,
            replaced,
        )

    def _flat_starts(self) -> Ints:
        """Where documents begin with the samples laid end to end; int64 [n], ascending."""
        counts = [len(starts) for starts in self.starts]
        base = np.arange(0, len(counts) * self.seq_len, self.seq_len, dtype=np.int64)
        return np.concatenate(self.starts) + base.repeat(counts)


def _merge(starts: Ints, size: int, row_len: int) -> NDArray[np.int32]:
    """Document starts and row starts in one ascending list of distinct places, int32, up to `size`."""
    edges = np.concatenate([starts.astype(np.int32), np.arange(0, size + 1, row_len, dtype=np.int32)])
    edges.sort()
    is_new = np.empty(len(edges), dtype=np.bool_)
    is_new[0] = True
    np.not_equal(edges[1:], edges[:-1], out=is_new[1:])
    distinct: NDArray[np.int32] = edges[is_new]
    return distinct


def _places(
    cu_seqlens: NDArray[np.int32], shape: tuple[int, int], allocate: Allocate
) -> tuple[Ints, NDArray[np.int32]]:
    """Positions and document starts, [rows, row_len] each."""
    rows, row_len = shape
    positions, doc_starts = allocate(shape, np.int64), allocate(shape, np.int32)
    flat_positions, flat_starts = positions.ravel(), doc_starts.ravel()
    begins = cu_seqlens[:-1] % row_len
    if len(begins) * FEW > rows * row_len:
        flat_starts[:] = np.repeat(begins, np.diff(cu_seqlens))
        np.subtract(np.arange(row_len, dtype=np.int64), doc_starts, out=positions)
        return positions, doc_starts
    count = _count(row_len)
    edges: Sequence[int] = cu_seqlens.tolist()
    for start, stop, begin in zip(edges[:-1], edges[1:], begins.tolist(), strict=True):
        flat_starts[start:stop] = begin
        flat_positions[start:stop] = count[: stop - start]
    return positions, doc_starts


@lru_cache(maxsize=8)
def _count(row_len: int) -> Ints:
    return np.arange(row_len, dtype=np.int64)


@lru_cache(maxsize=8)
def _row_places(shape: tuple[int, int]) -> Ints:
    """Positions of rows that count themselves: the same for every batch, which nobody writes to."""
    return np.tile(np.arange(shape[1], dtype=np.int64), (shape[0], 1))
