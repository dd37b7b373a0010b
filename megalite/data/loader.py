"""Samples to batches. A batch is a pure function of (seed, global sample indices), nothing else.

    global sample index ─ mixture ─→ source, n-th sample of it ─ order ─→ sample k of the source
        ─ shards ─→ tokens [k·seq, k·seq + seq] of its stream ─→ one row of a Batch

Nothing is remembered between batches, so a run can continue at any position, on any number of
ranks, with any micro-batch size, and sees the samples it would have seen.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from megalite.data.mixture import Mixture
from megalite.data.order import order_key, permute
from megalite.data.shards import Dataset
from megalite.errors import ConfigError, DataError

IGNORE = -100  # label of a token whose successor is not to be predicted


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what is to be predicted from them.

    Shapes, all [micro, seq] but sample_ids [micro]:
        tokens      int64
        labels      int64: the next token of the stream; IGNORE where that belongs to another document
        positions   int64: counted from the start of the document, or of the row if it began earlier
        doc_starts  int32: place in the row of the first token of each token's document
        sample_ids  int64: global sample indices
    Without document masks labels never ignore, positions count the row and doc_starts is None.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    doc_starts: NDArray[np.int32] | None
    sample_ids: NDArray[np.int64]


class SourceLike(Protocol):
    """What a configured source says: `megalite.config.Source`."""

    @property
    def path(self) -> str:
        """The dataset folder."""

    @property
    def weight(self) -> float:
        """Its share of samples, relative to the other sources."""


def open_sources(sources: Iterable[SourceLike]) -> list[tuple[Dataset, float]]:
    """Open every source's dataset.

    Raises:  DataError if one cannot be opened
    """
    return [(Dataset(Path(source.path)), source.weight) for source in sources]


def check_same_tokenizer(datasets: Sequence[Dataset]) -> None:
    """Training and validation must speak of the same ids.

    Raises:  DataError naming two folders and their fingerprints
    """
    for other in datasets[1:]:
        first = datasets[0]
        if other.tokenizer != first.tokenizer:
            raise DataError(
                f"{first.path} and {other.path} come from different tokenizers: fingerprints "
                f"{first.tokenizer.fingerprint[:16]}… and {other.tokenizer.fingerprint[:16]}…; rebuild one "
                "with the other's tokenizer.json"
            )


class DataLoader:
    """Batches from weighted datasets.

    Sample k of a source is the tokens [k·seq_len, k·seq_len + seq_len] of its stream, the last only
    as a label. Each pass over a source (epoch) has its own permutation when `shuffle` is on.

    Raises:  DataError if a source has no whole sample or the tokenizers differ; ConfigError if there
             are no sources or a weight is unusable
    """

    def __init__(
        self,
        sources: Sequence[tuple[Dataset, float]],
        *,
        seq_len: int,
        seed: int,
        document_mask: bool = True,
        shuffle: bool = True,
    ) -> None:
        self.datasets = [dataset for dataset, _ in sources]
        self.seq_len = seq_len
        self.samples = [(dataset.total_tokens - 1) // seq_len for dataset in self.datasets]
        self._mixture = Mixture([weight for _, weight in sources])
        self._seed = seed
        self._document_mask = document_mask
        self._shuffle = shuffle
        check_same_tokenizer(self.datasets)
        for dataset, samples in zip(self.datasets, self.samples, strict=True):
            if samples < 1:
                raise DataError(
                    f"{dataset.path} has {dataset.total_tokens} tokens, one sample of data.seq_len={seq_len} "
                    f"needs {seq_len + 1}; shorten seq_len or give more text"
                )

    @property
    def total_tokens(self) -> int:
        """Tokens in all sources."""
        return sum(dataset.total_tokens for dataset in self.datasets)

    def check_vocab(self, vocab_size: int) -> None:
        """A model must have a row for every id the data can hold.

        Raises:  DataError naming both sizes
        """
        largest = max(self.datasets, key=lambda dataset: dataset.vocab_size)
        if largest.vocab_size > vocab_size:
            raise DataError(
                f"{largest.path} was made with a vocabulary of {largest.vocab_size}, but "
                f"model.vocab_size={vocab_size}; set it to at least {largest.vocab_size}"
            )

    def locate(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and sample number within it of each global sample index; int64 [n] each."""
        source, nth = self._mixture.locate(sample_ids)
        sample = np.empty_like(nth)
        for s in np.flatnonzero(np.bincount(source, minlength=len(self.samples))):
            mine = np.flatnonzero(source == s)
            epoch, place = np.divmod(nth[mine], self.samples[s])
            if self._shuffle:
                for e in sorted(set(epoch.tolist())):
                    key = order_key(self._seed, e, int(s))
                    place[epoch == e] = permute(place[epoch == e], self.samples[s], key)
            sample[mine] = place
        return source, sample

    def batch(self, sample_indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The samples with these global indices, one a row, in this order.

        Raises:  DataError on a corrupt record batch
        """
        ids = np.array(sample_indices, dtype=np.int64)
        return self._gather(ids, *self.locate(ids))

    def micro_batches(
        self, position: int, global_batch_size: int, micro_batch_size: int, rank: int = 0, world: int = 1
    ) -> list[Batch]:
        """One rank's part of the step that begins at sample `position`.

        The step holds the samples [position, position + global_batch_size); rank r takes the r-th of
        `world` equal runs of them, in micro-batches. All ranks together see the same for any world.

        Raises:  ConfigError if the sizes do not divide; DataError on a corrupt record batch
        """
        if global_batch_size % (world * micro_batch_size):
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} is not a multiple of "
                f"train.micro_batch_size={micro_batch_size} × {world} processes"
            )
        share = global_batch_size // world
        ids = np.arange(share, dtype=np.int64) + (position + rank * share)
        parts = [array.reshape(-1, micro_batch_size) for array in (ids, *self.locate(ids))]
        return [self._gather(*part) for part in zip(*parts, strict=True)]

    def steps(
        self,
        position: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 2,
    ) -> Steps:
        """The endless run of steps from `position` on, `prefetch` of them read ahead by one thread."""
        return Steps(self, position, (global_batch_size, micro_batch_size, rank, world), prefetch)

    def _gather(
        self, ids: NDArray[np.int64], sources: NDArray[np.int64], samples: NDArray[np.int64]
    ) -> Batch:
        rows, seq = len(ids), self.seq_len
        tokens = np.empty((rows, seq), dtype=np.int64)
        labels = np.empty((rows, seq), dtype=np.int64)
        doc_starts = np.zeros((rows, seq), dtype=np.int32)
        for row, (source, sample) in enumerate(zip(sources.tolist(), samples.tolist(), strict=True)):
            start = sample * seq
            stream, boundaries, _ = self.datasets[source].read(start, start + seq + 1)
            tokens[row] = stream[:-1]
            labels[row] = stream[1:]
            if self._document_mask:
                inner = boundaries[boundaries > 0]  # a document that begins with the row needs no mark
                labels[row, inner - 1] = IGNORE
                _mark_documents(doc_starts[row], inner)
        places = np.arange(seq, dtype=np.int64)
        if not self._document_mask:
            positions = np.broadcast_to(places, (rows, seq)).copy()
            return Batch(tokens, labels, positions, None, ids)
        return Batch(tokens, labels, places - doc_starts, doc_starts, ids)


def _mark_documents(row: NDArray[np.int32], starts: NDArray[np.int64]) -> None:
    """Fill zeros [seq] with the latest of the ascending `starts` at or before each place."""
    if starts.size <= 8:  # the usual case, and several times faster than a scan of the row
        for start in starts.tolist():
            row[start:] = start
    else:
        inside = starts[starts < row.size]
        row[inside] = inside
        np.maximum.accumulate(row, out=row)


class Steps:
    """An iterator over steps, each a list of this rank's micro-batches. Close it, or use `with`.

    `wait_s` is the time its consumer has spent waiting for data.

    Raises:  whatever reading raised, once the steps read before it are consumed
    """

    def __init__(
        self, loader: DataLoader, position: int, shape: tuple[int, int, int, int], prefetch: int
    ) -> None:
        self.wait_s = 0.0
        self._loader = loader
        self._position = position
        self._shape = shape
        self._prefetch = prefetch
        self._ready: deque[list[Batch]] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        if prefetch:
            # A daemon, so that a consumer that dies without closing does not keep the process alive.
            self._thread = threading.Thread(target=self._read_ahead, name="megalite-data", daemon=True)
            self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Batch]:
        began = time.perf_counter()
        try:
            if self._closed:
                raise StopIteration
            return self._read() if self._thread is None else self._take()
        finally:
            self.wait_s += time.perf_counter() - began

    def close(self) -> None:
        """Stop reading ahead and wait for the thread to end. May be called twice."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> list[Batch]:
        step = self._loader.micro_batches(self._position, *self._shape)
        self._position += self._shape[0]
        return step

    def _take(self) -> list[Batch]:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error is not None or self._closed)
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def _read_ahead(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._prefetch or self._closed)
                    if self._closed:
                        return
                step = self._read()
                with self._changed:
                    if not self._closed:
                        self._ready.append(step)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
