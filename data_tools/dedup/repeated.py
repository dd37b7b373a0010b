"""Drop the documents that are mostly spans which earlier documents have, of those that are kept.

Whether an earlier one is kept depends on those before it, so one process decides, in the order of the corpus:
a span is held as soon as a document that has it is kept, and only words in held spans count against a
document. What a document repeats of itself does not, and what only dropped ones had is still to come.
Memory: 8 bytes a repeated span that no kept document has so far, and 100 a repeated one of a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_tools.compiled import compiled
from data_tools.dedup.shuffle import ShuffleWriter, number_of, part_of, read_bucket, read_rows, shuffle_files
from data_tools.documents import part_number, read_part
from data_tools.flow import KEPT, Flow

REPEATED = "repeated spans"  # a reason
_COLUMNS = 3  # of a document that has held spans: its row in the part, its words in such, all its words


def decide(
    span_words: int, max_share: float, shuffle: Path, files: int, numbers: int, paths: Sequence[Path]
) -> dict[str, Any]:
    """Rows (see _COLUMNS) to each of `numbers` parts, from the addresses in `matches` of every place of every
    span that has several, each with the address of its first."""
    matches, lost, dropped = shuffle_files(shuffle / "matches", files), np.zeros(0, dtype=np.uint64), 0
    with ShuffleWriter(shuffle / "decided" / "once.bin", numbers) as writer:
        for path in paths:
            part = part_number(path)
            places = read_rows(matches, part, 2)
            places = places[np.argsort(places[:, 0])]
            words = number_of(places[:, 0])
            spans, span = np.unique(places[:, 1], return_inverse=True)
            is_held = (part_of(spans) < part) & ~np.isin(spans, lost, assume_unique=True)
            sizes = read_bucket([shuffle / "words" / f"{path.stem}.bin"], 0).astype(np.int64)
            owners = np.searchsorted(np.cumsum(sizes), words, side="right")
            rows, begins = np.unique(owners, return_index=True)
            bounds, sizes = np.append(begins, len(owners)), sizes[rows]
            repeated = np.zeros(len(rows), dtype=np.int64)
            dropped += _decide(words, span, bounds, sizes, span_words, max_share, is_held, repeated)
            lost = np.concatenate([np.setdiff1d(lost, spans, assume_unique=True), spans[~is_held]])
            told = np.stack([rows, repeated, sizes], axis=1)[repeated > 0].astype(np.uint64)
            writer.write(np.full(len(told), part), told)
    return {"dropped": dropped}


def drop_repeated(max_share: float, shuffle: Path, path: Path, flow: Flow) -> Iterator[pa.RecordBatch]:
    """A step's transform: the part without the documents that were decided to be mostly repeated."""
    told = read_rows(shuffle_files(shuffle / "decided", 1), part_number(path), _COLUMNS).astype(np.int64)
    start = 0
    for batch in read_part(path):
        first, last = np.searchsorted(told[:, 0], [start, start + batch.num_rows]).tolist()
        verdicts = np.full(batch.num_rows, KEPT)
        why = [""] * batch.num_rows
        for row, repeated, total in told[first:last].tolist():
            why[row - start] = f"{repeated} of {total} words occurred before"
            verdicts[row - start] = 0 if repeated > max_share * total else KEPT
        out = batch.filter(pa.array(verdicts == KEPT)) if (verdicts != KEPT).any() else batch
        flow.count("documents with repeated spans", last - first)
        flow.pass_batch(batch, verdicts, [REPEATED], out, why)
        yield out
        start += batch.num_rows


@compiled
def _decide(
    words: NDArray[np.int64],
    span: NDArray[np.int64],
    bounds: NDArray[np.int64],
    sizes: NDArray[np.int64],
    span_words: int,
    max_share: float,
    is_held: NDArray[np.bool_],
    repeated: NDArray[np.int64],
) -> int:
    """Fill `repeated`, each document's words in held spans, and update `is_held`; how many are dropped.

    Document i has the spans span[place] that begin with words[place], place in [bounds[i], bounds[i + 1]).
    """
    dropped = 0
    for document in range(len(sizes)):
        end = np.int64(0)
        for place in range(bounds[document], bounds[document + 1]):
            if is_held[span[place]]:
                begin = max(end, words[place])
                end = words[place] + span_words
                repeated[document] += end - begin
        if repeated[document] > max_share * sizes[document]:
            dropped += 1
        else:
            for place in range(bounds[document], bounds[document + 1]):
                is_held[span[place]] = True
    return dropped
