"""Documents packed into samples so that none is cut that fits.

Within a chunk of a few record batches, a document longer than seq_len is cut into pieces of seq_len;
whole documents and what is left of long ones are packed, the longest first, each into the fullest
sample that has room for it. What stays free is padding.

Packing a chunk is a pure function of its documents' lengths, so a sample is found by packing its chunk
again. All that is stored is how many samples each chunk makes.

Source:  Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (best-fit decreasing)
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalite.data.batch import Rows
from megalite.data.order import CountedChunks, Layout
from megalite.data.packing import OPEN_BLOCKS, distinct_in_ranges
from megalite.data.shards import CorruptBlockError, Dataset
from megalite.errors import DataError

VERSION = 1  # of how documents are packed
CHUNK_TOKENS = 1 << 19  # at least: enough documents that nearly every gap finds one
CHUNK_SAMPLES = 64  # at least, where samples are long

Ints = NDArray[np.int64]


class Bins(NamedTuple):
    """Pieces of documents by the sample they are in: those of sample s are [edges[s], edges[s + 1]).

    Shapes:  edges int64 [samples + 1]; document, start (in the document) and length int64 [pieces]
    """

    edges: Ints
    document: Ints
    start: Ints
    length: Ints


def pack(lengths: Ints, seq_len: int) -> Bins:
    """Best-fit decreasing of documents of these lengths, int64 [documents]; empty ones take no part."""
    whole = lengths // seq_len
    rest = lengths - whole * seq_len
    long = np.repeat(np.arange(len(lengths)), whole)
    nth = np.arange(len(long)) - np.repeat(np.cumsum(whole) - whole, whole)
    left = np.flatnonzero(rest)
    left = left[np.argsort(-rest[left], kind="stable")]
    bin_of = _best_fit(rest[left].tolist(), seq_len)
    left = left[np.argsort(bin_of, kind="stable")]
    pieces = np.concatenate([np.ones(len(long), dtype=np.int64), np.bincount(bin_of)])
    return Bins(
        np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(pieces)]),
        np.concatenate([long, left]),
        np.concatenate([nth * seq_len, whole[left] * seq_len]),
        np.concatenate([np.full(len(long), seq_len), rest[left]]),
    )


def _best_fit(lengths: list[int], room: int) -> Ints:
    """The bin of each piece of the descending `lengths`; int64 [pieces].

    The free room of every open bin is a bit of one integer, so the tightest that is wide enough is the
    lowest bit of it shifted right.
    """
    rooms, bins, result = 0, 0, []
    with_room: dict[int, list[int]] = {}
    for length in lengths:
        if fitting := rooms >> length:
            free = length + (fitting & -fitting).bit_length() - 1
            chosen = with_room[free].pop()
            if not with_room[free]:
                rooms ^= 1 << free
        else:
            free, chosen, bins = room, bins, bins + 1
        result.append(chosen)
        if free := free - length:
            with_room.setdefault(free, []).append(chosen)
            rooms |= 1 << free
    return np.array(result, dtype=np.int64)


class Chunks:
    """The runs of record batches of a dataset whose documents are packed together."""

    def __init__(self, dataset: Dataset, seq_len: int) -> None:
        self.dataset, self.seq_len = dataset, seq_len
        mean = dataset.total_tokens / dataset.num_blocks
        self.width = max(1, round(max(CHUNK_TOKENS, CHUNK_SAMPLES * seq_len) / mean))
        self.count = -(-dataset.num_blocks // self.width)

    def blocks(self, chunk: int) -> range:
        """Record batches of a chunk."""
        return range(chunk * self.width, min((chunk + 1) * self.width, self.dataset.num_blocks))

    def lengths(self, chunk: int) -> Ints:
        """Of all documents of a chunk, int64 [documents].

        Raises:  CorruptBlockError
        """
        offsets = [self.dataset.block(number).offsets for number in self.blocks(chunk)]
        return np.concatenate([np.diff(offset) for offset in offsets]).astype(np.int64)


class Table(NamedTuple):
    """What each chunk of a dataset packs into: the one thing best-fit packing must know beforehand.

    It is the same for every run with the dataset and seq_len, and costs one look at the documents'
    lengths, which ranks divide among them. A chunk with a damaged record batch packs into nothing.

    Shapes:  counts int64 [chunks, 4]: samples, documents, those that were cut, tokens; damaged: (file,
             batch, reason) of each damaged record batch
    """

    counts: Ints
    damaged: list[tuple[str, int, str]]

    @classmethod
    def build(cls, chunks: Chunks, rank: int = 0, world: int = 1) -> Table:
        """The rows of every `world`-th chunk from the `rank`-th on; zeros in the others."""
        counts = np.zeros((chunks.count, 4), dtype=np.int64)
        damaged = []
        for chunk in range(rank, chunks.count, world):
            try:
                lengths = chunks.lengths(chunk)
            except CorruptBlockError as error:
                damaged.append((error.file, error.batch, error.reason))
                continue
            samples = len(pack(lengths, chunks.seq_len).edges) - 1
            counts[chunk] = samples, len(lengths), (lengths > chunks.seq_len).sum(), lengths.sum()
        return cls(counts, damaged)

    @classmethod
    def join(cls, tables: Iterable[Table]) -> Table:
        """The whole of what ranks built in part."""
        parts = list(tables)
        return cls(
            np.sum([part.counts for part in parts], axis=0), [bad for part in parts for bad in part.damaged]
        )

    @classmethod
    def from_json(cls, value: list[object]) -> Table:
        """The inverse of `to_json`."""
        counts, damaged = value
        rows = np.array(counts, dtype=np.int64).reshape(-1, 4)
        return cls(rows, [(str(file), int(batch), str(reason)) for file, batch, reason in damaged])  # type: ignore[attr-defined]

    def to_json(self) -> list[object]:
        """As JSON can hold it."""
        return [self.counts.tolist(), self.damaged]

    def save(self, folder: Path, chunks: Chunks) -> None:
        """Keep it in `folder`, whole or not at all.

        Raises:  OSError
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = table_file(folder, chunks)
        path.with_suffix(".tmp").write_text(json.dumps(self.to_json()), encoding="utf-8")
        os.replace(path.with_suffix(".tmp"), path)

    @classmethod
    def load(cls, folder: Path, chunks: Chunks) -> Table | None:
        """What `save` kept; None where there is none that fits, for it can be built again."""
        try:
            table = cls.from_json(json.loads(table_file(folder, chunks).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        is_sound = len(table.counts) == chunks.count and (table.counts >= 0).all()
        return table if is_sound else None


def table_file(folder: Path, chunks: Chunks) -> Path:
    """Where a run keeps a table; the name says what it depends on."""
    digest = chunks.dataset.manifest.digest
    return folder / f"packing{VERSION}-{digest}-{chunks.seq_len}-{chunks.width}.json"


class _Plan(NamedTuple):
    """A packed chunk: pieces int64 [pieces, 4] of (block, start and stop in it, whether the document goes
    on), by sample as in `Bins`."""

    edges: list[int]
    pieces: Ints


class BestFit:
    """Implements `Packing`; `table` is whole.

    Raises:  DataError if no chunk packs into anything
    """

    layout: Layout

    def __init__(self, chunks: Chunks, table: Table, window: int) -> None:
        self._chunks, self._dataset = chunks, chunks.dataset
        window = max(1, min(window, OPEN_BLOCKS // chunks.width))
        self.layout = CountedChunks(table.counts[:, 0], window)
        if not self.layout.num_samples:
            first = "".join(f", {file}: record batch {n} {reason}" for file, n, reason in table.damaged[:1])
            raise DataError(
                f"{chunks.dataset.path}: best_fit packs {chunks.width} record batches together, and none of "
                f"these chunks is without a damaged one{first}; rebuild the dataset"
            )
        self._first: list[int] = self.layout.first.tolist()
        self._eos_id = chunks.dataset.tokenizer.eos_id
        self._plan = lru_cache(maxsize=2 * window)(self._pack_chunk)

    def fill(self, sample: int, rows: Rows, row: int) -> None:
        """See `Packing`."""
        chunk = bisect_right(self._first, sample) - 1
        plan, place = self._plan(chunk), sample - self._first[chunk]
        out, seq_len = rows.stream[row], rows.seq_len
        filled, starts = 0, []
        counts = None
        for number, start, stop, goes_on in plan.pieces[plan.edges[place] : plan.edges[place + 1]].tolist():
            block = self._dataset.block(number)
            stop += goes_on  # a piece that goes on fills its sample: the next token is the last label
            out[filled : filled + stop - start] = block.tokens[start:stop]
            if block.loss_mask is not None:
                counts = np.ones(seq_len + 1, dtype=np.bool_) if counts is None else counts
                counts[filled : filled + stop - start] = block.loss_mask[start:stop]
            filled += stop - start
            starts.append(filled)
        if filled <= seq_len:
            out[filled:] = self._eos_id
            rows.pad(row, filled)
        else:
            starts.pop()
        if rows.masked:
            rows.mark_documents(row, np.array(starts, dtype=np.int32))
        if counts is not None:
            rows.mask_loss(row, counts)

    def blocks(self, samples: Ints) -> Ints:
        """See `Packing`."""
        chunk = np.searchsorted(self._first, samples, side="right") - 1
        first = chunk * self._chunks.width
        return distinct_in_ranges(first, np.minimum(first + self._chunks.width, self._dataset.num_blocks) - 1)

    def pieces(self, sample: int) -> list[tuple[int, int, int]]:
        """See `Packing`."""
        chunk = bisect_right(self._first, sample) - 1
        plan, place = self._plan(chunk), sample - self._first[chunk]
        rows = plan.pieces[plan.edges[place] : plan.edges[place + 1]].tolist()
        return [(number, start, stop) for number, start, stop, _ in rows]

    def _pack_chunk(self, chunk: int) -> _Plan:
        chunks = self._chunks
        offsets = [chunks.dataset.block(number).offsets for number in chunks.blocks(chunk)]
        lengths = np.concatenate([np.diff(offset) for offset in offsets]).astype(np.int64)
        bins = pack(lengths, chunks.seq_len)
        expected = self._first[chunk + 1] - self._first[chunk]
        if len(bins.edges) - 1 != expected:
            raise DataError(
                f"{chunks.dataset.path}: chunk {chunk} packs into {len(bins.edges) - 1} samples, the run's "
                f"table says {expected}; delete the run's packing folder to count again"
            )
        block = np.repeat(np.array(chunks.blocks(chunk)), [len(offset) - 1 for offset in offsets])
        begin = np.concatenate([offset[:-1] for offset in offsets])
        start = begin[bins.document] + bins.start
        goes_on = bins.start + bins.length < lengths[bins.document]
        pieces = np.stack([block[bins.document], start, start + bins.length, goes_on], axis=1)
        return _Plan(bins.edges.tolist(), pieces)
