"""Cut out spans of words that occurred before, such as licences and menus within otherwise new documents.

A span is `span_words` words in a row; where spans overlap, all their words make up one. The earliest of
equal spans stays, in the order of the corpus, and so does one that overlaps it. Phases:

seeds    every part: hashes of half as many words, but the least of every stretch of them as long as a span
         (winnowing, Schleimer 2003): equal spans choose equal seeds
known    every bucket: which seeds occur more than once
windows  every part: 128-bit hashes of the spans that hold such a seed
matches  every bucket: which of them occurred before
decided  once, to drop documents: which are mostly such (see `repeated`)
parts    every part without those words, or those documents

Two different spans pass for one if both halves of 128-bit hashes are equal, or 64-bit hashes of two words are
in the same place of otherwise equal spans: for 10⁹ different words 3 % that there is such a pair at all.
Disk: 1.2 bytes a word for seeds, 24 a word near a repeated one, to drop documents 16 more. Memory: as for
near duplicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from data_tools.compiled import compiled
from data_tools.crew import Crew
from data_tools.dedup import repeats
from data_tools.dedup.cut import covered, cut_out, show_cuts, word_spans
from data_tools.dedup.repeated import decide, drop_repeated
from data_tools.dedup.repeats import later_occurrences
from data_tools.dedup.shingles import SPLITTER, Words, split_rows, windows
from data_tools.dedup.shuffle import (
    ShuffleWriter,
    addresses,
    bucket_count,
    bucket_name,
    bucket_of,
    bucket_tasks,
    number_of,
    part_of,
    read_bucket,
    read_rows,
    remove_shuffle,
    shuffle_files,
)
from data_tools.documents import part_number, read_part, text_column, texts, with_column
from data_tools.flow import KEPT, Flow
from data_tools.step import Step, part_tasks, read_report, step_parts
from megalite.config.section import Section

KIND = "span-dedup"
VERSION = 3
BYTES_A_WORD = 6  # of text, about, taken over a corpus: for the number of buckets, not for correctness
SHORT = "too few words left"


class SpanSettings(Section):
    """Which repeated spans are cut out, and which documents are dropped for them."""

    span_words: int = Field(50, ge=8, le=4096, description="words from which a repeated span counts")
    mode: Literal["remove", "drop_document"] = Field(
        "remove", description="cut spans out, or drop documents mostly of such as earlier kept ones have"
    )
    min_words: int = Field(
        10, ge=1, description='with "remove", documents of which fewer words are left are dropped'
    )
    max_share: float = Field(
        0.5, ge=0, le=1, description='with "drop_document", the share of repeated words above which one is'
    )
    memory_bytes: int = Field(
        1 << 30, ge=1 << 10, description="memory of one worker for a bucket, which sets how many files"
    )


def run(settings: SpanSettings, source: Path, out: Path, crew: Crew, renew: bool = False) -> Flow:
    """Write the source's parts without spans that occurred before."""
    step = Step(out, KIND, VERSION, settings, [source], crew, renew=renew)
    if step.is_finished:
        return Flow.from_json(read_report(out))
    parts = step_parts(source)
    numbers = 1 + max(map(part_number, parts), default=0)
    words = Flow.from_json(read_report(source)).totals()[3] // BYTES_A_WORD
    buckets = bucket_count(words * 16 * 4 // settings.span_words, settings.memory_bytes)
    shuffle = out / "shuffle"

    def for_parts(phase: str, work: Any, number: int) -> list[dict[str, Any]]:
        return step.run(phase, part_tasks(parts, partial(work, settings, shuffle, number)))

    def for_buckets(phase: str, number: int, work: Any) -> list[dict[str, Any]]:
        return step.run(phase, bucket_tasks(number, partial(work, settings, shuffle, len(parts), numbers)))

    def done_with(*phases: str) -> None:
        for phase in phases if crew.is_first else ():
            remove_shuffle(shuffle / phase)

    for_parts("seeds", _write_seeds, buckets)
    known = for_buckets("known", buckets, _write_known)
    done_with("seeds")
    # A seed stands for the spans that hold it, which are as many as half a span has words.
    repeated = sum(result["seeds"] for result in known) * (settings.span_words // 2 + 1)
    span_buckets = bucket_count(repeated * repeats.COLUMNS * 8, settings.memory_bytes)
    for_parts("windows", partial(_write_windows, buckets), span_buckets)
    done_with("known")
    for_buckets("matches", span_buckets, _write_matches)
    done_with("windows")
    if settings.mode == "drop_document":
        share = settings.max_share
        work = partial(decide, settings.span_words, share, shuffle, span_buckets, numbers, parts)
        step.once("decided", work)
        flows = step.map_parts(parts, partial(drop_repeated, share, shuffle))
    else:
        flows = step.map_parts(parts, partial(_cut_spans, settings, shuffle, span_buckets))
    if crew.is_first:
        remove_shuffle(shuffle)
    return step.finish(flows, splitter=SPLITTER)


def _write_seeds(settings: SpanSettings, shuffle: Path, buckets: int, path: Path) -> dict[str, Any]:
    """Rows of (seed, address of its first word), and the number of words of every document."""
    part, count = part_number(path), 0
    size = settings.span_words // 2
    with (
        ShuffleWriter(shuffle / "seeds" / f"{path.stem}.bin", buckets) as writer,
        ShuffleWriter(shuffle / "words" / f"{path.stem}.bin", 1) as lengths,
    ):
        for batch in read_part(path, ["text"]):
            words = split_rows(texts(batch.column("text")), np.arange(batch.num_rows))
            seeds, bounds = windows(words.hashes, words.bounds, size)
            chosen = np.empty(len(seeds), dtype=np.int64)
            chosen = chosen[: _winnow(seeds, bounds, settings.span_words - size + 1, chosen)]
            row = np.searchsorted(bounds, chosen, side="right") - 1
            word = chosen - bounds[row] + words.bounds[row] + count
            records = np.stack([seeds[chosen], addresses(part, word)], axis=1)
            writer.write(bucket_of(records[:, 0], buckets), records)
            numbers = np.diff(words.bounds).astype(np.uint64)
            lengths.write(np.zeros(len(numbers), dtype=np.int64), numbers[:, None])
            count += len(words.hashes)
    return {"words": count}


def _write_known(
    settings: SpanSettings, shuffle: Path, files: int, parts: int, bucket: int
) -> dict[str, Any]:
    """The addresses of seeds that occur more than once, to their parts."""
    records = read_rows(shuffle_files(shuffle / "seeds", files), bucket, 2)
    order = np.argsort(records[:, 0])
    hashes = records[order, 0]
    same = hashes[1:] == hashes[:-1]
    is_repeated = np.zeros(len(hashes), dtype=bool)
    is_repeated[1:] |= same
    is_repeated[:-1] |= same
    found = records[order[is_repeated], 1]
    with ShuffleWriter(shuffle / "known" / f"{bucket_name(bucket)}.bin", parts) as writer:
        writer.write(part_of(found), found[:, None])
    return {"seeds": len(found)}


def _write_windows(
    known_files: int, settings: SpanSettings, shuffle: Path, buckets: int, path: Path
) -> dict[str, Any]:
    """Rows of (hash, hash, address of the first word) of every span that holds a repeated seed."""
    part, size = part_number(path), settings.span_words
    seeds = number_of(read_bucket(shuffle_files(shuffle / "known", known_files), part))
    total = 0
    with ShuffleWriter(shuffle / "windows" / f"{path.stem}.bin", buckets) as writer:
        for _, _, words, firsts, here in _rows_with(path, shuffle, np.sort(seeds), ["text"]):
            halves = [windows(words.hashes, words.bounds, size, base) for base in (0, 1)]
            bounds = halves[0][1]
            row = np.searchsorted(words.bounds, here, side="right") - 1
            # Of the windows of its row: from the one that ends with the seed to the one that begins with it.
            shift = bounds[row] - words.bounds[row]
            low = np.maximum(here - (size - size // 2), words.bounds[row]) + shift
            high = np.minimum(here + 1 + shift, bounds[row + 1])
            wanted = np.flatnonzero(covered(len(halves[0][0]), low, np.maximum(low, high)))
            row = np.searchsorted(bounds, wanted, side="right") - 1
            where = addresses(part, wanted - bounds[row] + firsts[row])
            records = np.stack([halves[0][0][wanted], halves[1][0][wanted], where], axis=1)
            writer.write(bucket_of(records[:, 0], buckets), records)
            total += len(records)
    return {"windows": total}


def _write_matches(
    settings: SpanSettings, shuffle: Path, files: int, parts: int, bucket: int
) -> dict[str, Any]:
    """The addresses of spans that occurred before and do not overlap the earliest such, to their parts.

    To drop documents, of all that occur more than once, each with the earliest.
    """
    found = later_occurrences(read_rows(shuffle_files(shuffle / "windows", files), bucket, repeats.COLUMNS))
    if settings.mode == "drop_document":
        first = np.unique(found[:, 1])
        found = np.concatenate([np.stack([first, first], axis=1), found])
    else:
        found = found[found[:, 1] + np.uint64(settings.span_words) <= found[:, 0], :1]
    with ShuffleWriter(shuffle / "matches" / f"{bucket_name(bucket)}.bin", parts) as writer:
        writer.write(part_of(found[:, 0]), found)
    return {"spans": len(found)}


def _cut_spans(
    settings: SpanSettings, shuffle: Path, files: int, path: Path, flow: Flow
) -> Iterator[pa.RecordBatch]:
    """A step's transform: the part's documents without the spans found."""
    found = np.sort(number_of(read_bucket(shuffle_files(shuffle / "matches", files), part_number(path))))
    for batch, rows, words, _, here in _rows_with(path, shuffle, found, None):
        text = texts(batch.column("text"))
        is_repeated = covered(len(words.hashes), here, here + settings.span_words)
        repeated = np.add.reduceat(is_repeated, words.bounds[:-1], dtype=np.int64) if len(rows) else rows
        total = np.diff(words.bounds)
        verdicts = np.full(batch.num_rows, KEPT)
        verdicts[rows[total - repeated < settings.min_words]] = 0
        owner, starts, ends = word_spans(words, is_repeated, text.offsets[rows + 1])
        changed = with_column(batch, "text", text_column(*cut_out(text, starts, ends)))
        show_cuts(flow, "repeated span", batch, rows[owner], starts, ends)
        flow.count("spans cut", len(starts))
        flow.count("words cut", int(repeated.sum()))
        flow.count("documents with repeated spans", len(rows))
        why = [""] * batch.num_rows
        for row, some, of in zip(rows.tolist(), repeated.tolist(), total.tolist(), strict=True):
            why[row] = f"{some} of {of} words occurred before"
        out = changed.filter(pa.array(verdicts == KEPT))
        flow.pass_batch(batch, verdicts, [SHORT], out, why)
        yield out


def _rows_with(
    path: Path, shuffle: Path, places: NDArray[np.int64], columns: list[str] | None
) -> Iterator[tuple[pa.RecordBatch, NDArray[np.int64], Words, NDArray[np.int64], NDArray[np.int64]]]:
    """Batches of a part, with the rows that hold some of `places`, words by their number in the part.

    Yields (batch, rows, their words, number of each row's first word, which of their words are in `places`).
    """
    lengths = read_bucket([shuffle / "words" / f"{path.stem}.bin"], 0).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    count = 0
    for batch in read_part(path, columns):
        bounds = starts[count : count + batch.num_rows + 1]
        inside = places[slice(*np.searchsorted(places, bounds[[0, -1]]).tolist())]
        owner = np.searchsorted(bounds, inside, side="right") - 1
        is_new = np.ones(len(owner), dtype=bool)
        is_new[1:] = owner[1:] != owner[:-1]
        rows = owner[is_new]
        words = split_rows(texts(batch.column("text")), rows)
        index = np.cumsum(is_new) - 1
        yield batch, rows, words, bounds[rows], inside - bounds[owner] + words.bounds[index]
        count += batch.num_rows


@compiled
def _winnow(
    hashes: NDArray[np.uint64], bounds: NDArray[np.int64], width: int, chosen: NDArray[np.int64]
) -> int:
    """The first least of every `width` hashes in a row; how many were chosen."""
    count = 0
    for row in range(len(bounds) - 1):
        least = np.int64(-1)
        for start in range(bounds[row], bounds[row + 1] - width + 1):
            if least < start:
                least = np.int64(start)
                for place in range(start + 1, start + width):
                    if hashes[place] < hashes[least]:
                        least = np.int64(place)
            elif hashes[start + width - 1] < hashes[least]:
                least = np.int64(start + width - 1)
            else:
                continue
            chosen[count] = least
            count += 1
    return count
