"""Keep one of documents that are nearly the same: MinHash bands find candidates, exact Jaccard decides.

A document is the set of its shingles, the hashes of n words in a row. Six phases, each of tasks that any
worker may do, with rows shuffled between them through files:

bands       every part: MinHash band hashes of every document, to buckets by hash
groups      every bucket: which documents share a band
components  once: which documents hang together by shared bands (union-find)
sets        every part: the shingle sets of those documents, to buckets by component
clusters    every bucket: pairs that share a band compared exactly, those alike joined; who stays
parts       every part without those that do not

Disk, at most: 16 bytes a band and document, twice; 8 bytes a word of candidates. Memory: `memory_bytes` a
worker, or a row group with 24 bytes a word of it; for components 64 bytes a candidate, on one machine.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data_tools.compiled import compiled
from data_tools.crew import Crew
from data_tools.dedup.clusters import Sets, cluster, similarities
from data_tools.dedup.minhash import band_hashes, chance_of_meeting
from data_tools.dedup.removal import drop_twins, removals
from data_tools.dedup.shingles import SPLITTER, split_rows, windows
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
from data_tools.dedup.union_find import settle, unite
from data_tools.documents import Texts, check_number, part_number, read_part, texts
from data_tools.flow import Flow
from data_tools.step import Step, part_tasks, read_report, step_parts, step_schema
from megalite.config.section import Section

KIND = "near-dedup"
VERSION = 2
REASON = "near duplicate"
_AT_ONCE = 1 << 20  # rows written, for what is held beside them
_HEAD = 4  # words before a set: the document's address, bytes, rank as float64 bits, and the set's size


class NearSettings(Section):
    """When documents are near duplicates, and which of them stays."""

    shingle_words: int = Field(5, ge=1, le=64, description="words a shingle; a shorter document is one")
    bands: int = Field(14, ge=1, description="documents that share one of these bands of hashes are compared")
    rows: int = Field(8, ge=1, description="MinHashes a band; bands x rows are computed, 112 by default")
    threshold: float = Field(
        0.8, gt=0, le=1, description="exact Jaccard similarity of shingle sets from which they are duplicates"
    )
    keep: Literal["longest", "best", "first"] = Field(
        "longest", description="who stays of a cluster; the earliest of equals"
    )
    best_column: str | None = Field(
        None, description='the number that is greatest in the best, for keep = "best"'
    )
    max_comparisons: int = Field(
        1000,
        ge=1,
        description="earlier documents that one is held against at most in a band; counted where it binds",
    )
    seed: int = Field(0, ge=0, description="of the hashes")
    memory_bytes: int = Field(
        1 << 30, ge=1 << 10, description="memory of one worker for a bucket, which sets how many files"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.bands * self.rows > 4096:
            raise ValueError(f"bands={self.bands} x rows={self.rows} hashes; at most 4096 are computed")
        if (self.keep == "best") != (self.best_column is not None):
            raise ValueError('best_column goes with keep = "best", and only with it')
        return self


def run(settings: NearSettings, source: Path, out: Path, crew: Crew, renew: bool = False) -> Flow:
    """Write the source's parts without near duplicates.

    Raises:  DataError if `best_column` is missing or no number
    """
    if (schema := step_schema(source)) is not None:
        check(settings, schema, str(source))
    step = Step(out, KIND, VERSION, settings, [source], crew, renew=renew)
    if step.is_finished:
        return Flow.from_json(read_report(out))
    parts = step_parts(source)
    numbers = 1 + max(map(part_number, parts), default=0)
    documents = Flow.from_json(read_report(source)).totals()[1]
    buckets = bucket_count(documents * settings.bands * 16, settings.memory_bytes)
    shuffle = out / "shuffle"

    def done_with(phase: str) -> None:
        if crew.is_first:
            remove_shuffle(shuffle / phase)

    def for_parts(phase: str, work: Any, *arguments: Any) -> list[dict[str, Any]]:
        return step.run(phase, part_tasks(parts, partial(work, settings, shuffle, *arguments)))

    def for_buckets(phase: str, number: int, work: Any, *arguments: Any) -> list[dict[str, Any]]:
        return step.run(phase, bucket_tasks(number, partial(work, settings, shuffle, *arguments)))

    banded = for_parts("bands", _write_bands, buckets)
    for_buckets("groups", buckets, _write_groups, len(parts))
    done_with("bands")
    shingles = sum(result["shingles"] for result in banded)
    mean_bytes = 8 * (_HEAD + 2 * settings.bands + shingles // max(documents, 1))
    joined = step.once(
        "components", partial(_write_components, settings, shuffle, buckets, numbers, mean_bytes)
    )
    done_with("groups")
    for_parts("sets", _write_sets, joined["buckets"])
    done_with("components")
    compared = for_buckets("clusters", joined["buckets"], _write_clusters, len(parts), numbers)
    done_with("sets")
    flows = step.map_parts(parts, partial(drop_twins, shuffle / "clusters", joined["buckets"], REASON))
    if crew.is_first:
        remove_shuffle(shuffle)
    totals = Flow()
    totals.count("candidates", joined["candidates"])
    for result in compared:
        for name, number in result.items():
            totals.count(name, number)
    meets = chance_of_meeting(settings.threshold, settings.bands, settings.rows)
    return step.finish(
        [*flows, totals], splitter=SPLITTER, chance_to_be_compared_at_threshold=round(meets, 4)
    )


def check(settings: NearSettings, schema: pa.Schema, source: str) -> None:
    """Raises:  DataError unless documents with these columns can be judged so"""
    if settings.best_column is not None:
        check_number(schema, settings.best_column, "near.best_column", source)


def shingle_sets(
    settings: NearSettings, text: Texts, rows: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Shingle hashes of these rows in the order of their words, with repeats; and their bounds."""
    words = split_rows(text, rows)
    return windows(words.hashes, words.bounds, settings.shingle_words, short=True)


def _write_bands(settings: NearSettings, shuffle: Path, buckets: int, path: Path) -> dict[str, Any]:
    """Rows of (band hash, address) of every document with a word."""
    part, count, total = part_number(path), 0, 0
    with ShuffleWriter(shuffle / "bands" / f"{path.stem}.bin", buckets) as writer:
        for batch in read_part(path, ["text"]):
            rows = np.arange(batch.num_rows)
            shingles, bounds = shingle_sets(settings, texts(batch.column("text")), rows)
            rows = rows[np.diff(bounds) > 0]
            bands = band_hashes(
                shingles, bounds[rows], bounds[rows + 1], settings.bands, settings.rows, settings.seed
            )
            where = np.repeat(addresses(part, rows + count), settings.bands)
            records = np.stack([bands.ravel(), where], axis=1)
            writer.write(bucket_of(records[:, 0], buckets), records)
            count += batch.num_rows
            total += len(shingles)
    return {"shingles": total}


def _write_groups(settings: NearSettings, shuffle: Path, files: int, bucket: int) -> dict[str, Any]:
    """Rows of two addresses that share a band; a band's documents are a chain of such pairs."""
    records = read_rows(shuffle_files(shuffle / "bands", files), bucket, 2)
    order = np.argsort(records[:, 0])
    hashes = records[order, 0]
    place = np.flatnonzero(hashes[1:] == hashes[:-1])
    pairs = np.stack([records[order[place], 1], records[order[place + 1], 1]], axis=1)
    with ShuffleWriter(shuffle / "groups" / f"{bucket_name(bucket)}.bin", 1) as writer:
        writer.write(np.zeros(len(pairs), dtype=np.int64), pairs)
    return {"pairs": len(pairs)}


def _write_components(
    settings: NearSettings, shuffle: Path, files: int, parts: int, mean_bytes: int
) -> dict[str, Any]:
    """Rows of (address, bucket of its component) to each part; how many buckets there are."""
    paths = shuffle_files(shuffle / "groups", files)
    candidates = np.zeros(0, dtype=np.uint64)
    waiting: list[NDArray[np.uint64]] = []
    for path in paths:
        waiting.append(_distinct(read_bucket([path], 0)))
        if sum(some.size for some in waiting) > candidates.size or path == paths[-1]:
            candidates = _distinct(np.concatenate([candidates, *waiting]))
            waiting = []
    parents = np.arange(len(candidates))
    for path in paths:
        pairs = _places(candidates, read_bucket([path], 0)).reshape(-1, 2)
        unite(parents, pairs[:, 0].copy(), pairs[:, 1].copy())
    settle(parents)
    buckets = bucket_count(len(candidates) * mean_bytes, settings.memory_bytes)
    # Whole components to buckets, in order, so that each bucket has about as many documents.
    sizes = np.bincount(parents, minlength=len(parents))
    starts = np.cumsum(sizes) - sizes
    with ShuffleWriter(shuffle / "components" / "once.bin", parts) as writer:
        for first in range(0, len(candidates), _AT_ONCE):
            some = candidates[first : first + _AT_ONCE]
            chosen = starts[parents[first : first + _AT_ONCE]] * buckets // len(candidates)
            writer.write(part_of(some), np.stack([some, chosen.astype(np.uint64)], axis=1))
    return {"candidates": len(candidates), "components": int((sizes > 0).sum()), "buckets": buckets}


def _write_sets(settings: NearSettings, shuffle: Path, buckets: int, path: Path) -> dict[str, Any]:
    """Rows of a candidate's head (see _HEAD) and its shingles, sorted and without repeats."""
    part, count = part_number(path), 0
    chosen = read_rows(shuffle_files(shuffle / "components", 1), part, 2)
    columns = ["text", *([settings.best_column] if settings.best_column else [])]
    with ShuffleWriter(shuffle / "sets" / f"{path.stem}.bin", buckets) as writer:
        for batch in read_part(path, columns) if len(chosen) else ():
            bounds = addresses(part, np.array([count, count + batch.num_rows]))
            first, last = np.searchsorted(chosen[:, 0], bounds).tolist()
            rows = number_of(chosen[first:last, 0]) - count
            text = texts(batch.column("text"))
            shingles, ends = shingle_sets(settings, text, rows)
            sets = _sorted_sets(shingles, ends)
            heads = np.empty((len(rows), _HEAD), dtype=np.uint64)
            heads[:, 0], heads[:, 1] = chosen[first:last, 0], text.sizes[rows]
            heads[:, 2] = _ranks(settings, batch, rows).view(np.uint64)
            heads[:, 3] = [len(some) for some in sets]
            joined = [np.concatenate(pair) for pair in zip(heads, sets, strict=True)]
            writer.write(chosen[first:last, 1].astype(np.int64), joined)
            count += batch.num_rows
    return {"candidates": len(chosen)}


def _write_clusters(
    settings: NearSettings, shuffle: Path, files: int, parts: int, bucket: int
) -> dict[str, Any]:
    """Removals to each part."""
    spill = shuffle / "sets" / f"{bucket_name(bucket)}.spill"
    records = read_bucket(shuffle_files(shuffle / "sets", files), bucket, settings.memory_bytes, spill)
    heads = _heads(records)
    begins = heads + _HEAD
    sets = Sets(records, begins, begins + records[heads + 3].astype(np.int64))
    bands = band_hashes(*sets, settings.bands, settings.rows, settings.seed)
    found = cluster(sets, bands, settings.threshold, settings.max_comparisons)
    kept = _keepers(found.roots, records[heads + 2].view(np.float64))
    gone = np.flatnonzero(kept != np.arange(len(kept)))
    likeness = similarities(sets, gone, kept[gone])
    address = records[heads]
    with ShuffleWriter(shuffle / "clusters" / f"{bucket_name(bucket)}.bin", parts) as writer:
        writer.write(part_of(address[gone]), removals(address[gone], address[kept[gone]], likeness))
    spill.unlink(missing_ok=True)
    return {
        "pairs compared": found.compared,
        "pairs alike": found.alike,
        "pairs left out by max_comparisons, at most": found.left_out,
        "clusters": len(np.unique(found.roots[gone])),
        "removed that are alike to the kept only through others": int((likeness < settings.threshold).sum()),
    }


def _keepers(roots: NDArray[np.int64], ranks: NDArray[np.float64]) -> NDArray[np.int64]:
    """Who stays of each one's cluster: the highest rank, of equals the first; int64 [sets]."""
    order = np.lexsort((-ranks, roots))
    is_first = np.ones(len(roots), dtype=bool)
    is_first[1:] = roots[order[1:]] != roots[order[:-1]]
    best = np.empty(len(roots), dtype=np.int64)
    best[roots[order[is_first]]] = order[is_first]
    return best[roots]


def _ranks(settings: NearSettings, batch: pa.RecordBatch, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """What the document that stays has most of, float64 [rows]; a missing number is the least."""
    if settings.keep == "first":
        return np.zeros(len(rows))
    if settings.best_column is None:
        return texts(batch.column("text")).sizes[rows].astype(np.float64)
    column = batch.column(settings.best_column).cast(pa.float64(), safe=False).fill_null(-np.inf)
    values: NDArray[np.float64] = column.to_numpy(zero_copy_only=False)[rows]
    return np.where(np.isnan(values), -np.inf, values)


def _sorted_sets(shingles: NDArray[np.uint64], bounds: NDArray[np.int64]) -> list[NDArray[np.uint64]]:
    return [_distinct(shingles[bounds[row] : bounds[row + 1]]) for row in range(len(bounds) - 1)]


def _places(ordered: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each value lies; looked up in their order, five times as fast for the processor's cache."""
    order = np.argsort(values)
    places = np.empty(len(values), dtype=np.int64)
    places[order] = np.searchsorted(ordered, values[order])
    return places


def _distinct(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Sorted, without repeats."""
    ordered = np.sort(values)
    keep = np.ones(len(values), dtype=bool)
    keep[1:] = ordered[1:] != ordered[:-1]
    distinct: NDArray[np.uint64] = ordered[keep]
    return distinct


@compiled
def _heads(records: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each record begins."""
    starts = np.empty(len(records) // (_HEAD + 1) + 1, dtype=np.int64)
    count = at = 0
    while at < len(records):
        starts[count] = at
        at += _HEAD + int(records[at + 3])
        count += 1
    return starts[:count].copy()
