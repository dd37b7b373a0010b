"""Rows of a token stream to the arrays a model takes: tokens, labels, positions, document starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

IGNORE = -100  # label of a token whose successor is not to be predicted

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
        sample_ids  int64 [rows]: global sample index; of samples cut into r rows, r · index + 0 … r − 1
        cu_seqlens  int32 [documents + 1]: where documents begin and end with all rows laid end to end; a row
                    begins one, and so does its padding
        replaced    the samples that others stand for
    Without document masks positions count the row, doc_starts is None and cu_seqlens has the rows. Arrays
    may share memory, also with other batches: nobody writes to them.
    """

    tokens: Ints
    labels: Ints
    positions: Ints
    doc_starts: NDArray[np.int32] | None
    sample_ids: Ints
    cu_seqlens: NDArray[np.int32]
    replaced: tuple[Replacement, ...] = ()


class Rows:
    """Samples of `seq_len` tokens on their way into a batch. Whoever reads fills one after the other, and
    marks documents where they are `masked`: attention is to stay within each.

    Shapes:  stream uint16|uint32 [samples, seq_len + 1], the last column for labels only
    """

    def __init__(self, samples: int, seq_len: int, dtype: DTypeLike, masked: bool) -> None:
        self.seq_len, self.masked = seq_len, masked
        self.stream: NDArray[Any] = np.empty((samples, seq_len + 1), dtype=dtype)
        self._starts: list[NDArray[np.int32]] = []
        self._bases: list[int] = []
        self._padding: list[tuple[int, int]] = []
        self._loss_masks: list[tuple[int, NDArray[np.bool_]]] = []

    def mark_documents(self, row: int, starts: NDArray[np.int32], base: int = 0) -> None:
        """Documents begin at the places `starts` − base of a row; ascending, in (0, seq_len]."""
        self._starts.append(starts)
        self._bases.append(row * self.seq_len - base)

    def pad(self, row: int, used: int) -> None:
        """A row has nothing from place `used` on."""
        self._padding.append((row, used))

    def mask_loss(self, row: int, counts: NDArray[np.bool_]) -> None:
        """Which of a row's tokens count for the loss, bool [seq_len + 1]."""
        self._loss_masks.append((row, counts))

    def batch(
        self,
        sample_ids: Ints,
        row_len: int,
        replaced: tuple[Replacement, ...],
        allocate: Allocate,
    ) -> Batch:
        """The arrays of these samples, each cut into rows of `row_len`, made by `allocate`."""
        samples, seq_len = len(self.stream), self.seq_len
        is_edited = self.masked or self._padding or self._loss_masks or row_len < seq_len
        if allocate is np.empty and not is_edited:
            # Widened once, seen twice. From memory of its own kind a device copies whole arrays only.
            wide: Ints = self.stream.astype(np.int64)
            tokens, labels = wide[:, :-1], wide[:, 1:]
        else:
            tokens = allocate((samples, seq_len), np.int64)
            labels = allocate((samples, seq_len), np.int64)
            tokens[...] = self.stream[:, :-1]
            labels[...] = self.stream[:, 1:]
        for sample, used in self._padding:
            labels[sample, used - 1 :] = IGNORE
        for sample, counts in self._loss_masks:
            labels[sample, ~counts[1:]] = IGNORE
        if row_len < seq_len:
            pieces = seq_len // row_len
            sample_ids = (sample_ids[:, None] * pieces + np.arange(pieces)).ravel()
        shape = (samples * seq_len // row_len, row_len)
        tokens, labels = tokens.reshape(shape), labels.reshape(shape)
        edges = _row_edges(shape)
        if not self.masked:
            return Batch(tokens, labels, _row_places(shape, allocate), None, sample_ids, edges, replaced)
        if self._starts:
            starts = np.concatenate(self._starts)
            starts = starts + np.array(self._bases, dtype=np.int32).repeat([len(s) for s in self._starts])
            labels.ravel()[starts - 1] = IGNORE
            edges = _union(starts, edges)
        doc_starts, positions = allocate(shape, np.int32), allocate(shape, np.int64)
        doc_starts.ravel()[...] = (edges[:-1] % row_len).repeat(edges[1:] - edges[:-1])
        np.subtract(np.arange(row_len), doc_starts, out=positions)
        return Batch(tokens, labels, positions, doc_starts, sample_ids, edges, replaced)


def _union(a: NDArray[np.int32], b: NDArray[np.int32]) -> NDArray[np.int32]:
    """Distinct values of both, ascending."""
    values = np.concatenate([a, b])
    values.sort()
    is_new = np.ones(len(values), dtype=np.bool_)
    np.not_equal(values[1:], values[:-1], out=is_new[1:])
    distinct: NDArray[np.int32] = values[is_new]
    return distinct


# The same for every batch of a shape; nobody writes to them.


@lru_cache(maxsize=8)
def _row_edges(shape: tuple[int, int]) -> NDArray[np.int32]:
    """Where rows begin and end with all of them laid end to end, int32 [rows + 1]."""
    return np.arange(0, shape[0] * shape[1] + 1, shape[1], dtype=np.int32)


@lru_cache(maxsize=8)
def _row_places(shape: tuple[int, int], allocate: Allocate) -> Ints:
    """Positions of rows that count themselves, int64 [rows, row_len]."""
    places = allocate(shape, np.int64)
    places[...] = np.arange(shape[1])
    return places
