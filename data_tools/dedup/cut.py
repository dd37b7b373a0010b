"""Cut spans of bytes out of a column of texts, and show some of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_tools.compiled import compiled
from data_tools.dedup.shingles import Words
from data_tools.documents import Texts, texts
from data_tools.flow import EXAMPLES, Flow


def cut_out(text: Texts, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Texts:
    """The texts without the bytes [starts[i], ends[i]) of the data.

    Spans are in order, without overlap, each within a row and between characters.
    """
    out = np.empty(int(text.offsets[-1] - text.offsets[0] - (ends - starts).sum()), dtype=np.uint8)
    offsets = np.zeros_like(text.offsets)
    _cut(text.data, text.offsets, starts, ends, out, offsets)
    return Texts(out, offsets)


def word_spans(
    words: Words, is_marked: NDArray[np.bool_], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The bytes of marked words in a row, each with what divides it from the next: rows, starts and ends.

    Shapes:  is_marked bool [words]; ends int64 [rows], where each row's text ends
    """
    rows = np.repeat(np.arange(len(ends)), np.diff(words.bounds))
    edge = np.ones(len(rows) + 1, dtype=bool)  # a row, or a stretch of words marked or not, begins here
    edge[1:-1] = (rows[1:] != rows[:-1]) | (is_marked[1:] != is_marked[:-1])
    bounds = np.flatnonzero(edge)
    first, stop = bounds[:-1], bounds[1:]
    first, stop = first[is_marked[first]], stop[is_marked[first]]
    owner = rows[first]
    next_word = words.starts[np.minimum(stop, len(rows) - 1)]
    return owner, words.starts[first], np.where(stop < words.bounds[owner + 1], next_word, ends[owner])


def covered(size: int, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of `size` places lie in one of the ranges, bool [size]."""
    steps = np.bincount(starts, minlength=size + 1) - np.bincount(ends, minlength=size + 1)
    return np.cumsum(steps)[:size] > 0


def show_cuts(
    flow: Flow,
    label: str,
    batch: pa.RecordBatch,
    rows: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
) -> None:
    """Give a flow some of the spans cut out of a batch's texts as examples; `rows` says whose each is."""
    data = texts(batch.column("text")).data
    for span in first_of_each_source(batch, rows):
        row = int(rows[span])
        text = data[starts[span] : ends[span]].tobytes().decode()
        flow.example(batch.column("source")[row].as_py(), label, batch.column("id")[row].as_py(), text)


def first_of_each_source(batch: pa.RecordBatch, rows: NDArray[np.int64]) -> list[int]:
    """Indices into `rows` of as many as a flow keeps as examples, for every source."""
    seen: dict[str, int] = {}
    chosen = []
    for index, source in enumerate(batch.column("source").take(pa.array(rows)).to_pylist()):
        seen[source] = seen.get(source, 0) + 1
        if seen[source] <= EXAMPLES:
            chosen.append(index)
    return chosen


@compiled
def _cut(
    data: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    out: NDArray[np.uint8],
    offsets: NDArray[np.int64],
) -> None:
    span = written = 0
    for row in range(len(bounds) - 1):
        at = bounds[row]
        while at < bounds[row + 1]:
            has_span = span < len(starts) and starts[span] < bounds[row + 1]
            stop = starts[span] if has_span else bounds[row + 1]
            for byte in range(at, stop):
                out[written + byte - at] = data[byte]
            written += stop - at
            at = stop
            if has_span:
                at = ends[span]
                span += 1
        offsets[row + 1] = written
