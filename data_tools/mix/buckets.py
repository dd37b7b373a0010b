"""Sort the documents of each source into buckets of equal text by a number, for a curriculum.

The bounds are quantiles over all parts, found by two passes of histograms over the leading 32 bits of the
number, in which equal numbers stay together; so they depend neither on the parts nor on who reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from data_tools.crew import Crew
from data_tools.documents import (
    BUCKET,
    check_number,
    read_part,
    read_schema,
    rows_by_source,
    texts,
    with_column,
)
from data_tools.flow import KEPT, Flow
from data_tools.step import Step, part_tasks, read_report, step_parts, step_schema
from megalite.config.section import Section

KIND = "buckets"
VERSION = 1
LENGTH = "length"

Histogram = dict[str, dict[int, int]]  # source → leading bits of a document's key → bytes of text


class BucketSettings(Section):
    """What documents are ordered by."""

    by: str = Field(LENGTH, description="length (bytes of text), or a column of numbers, e.g. quality")
    num_buckets: int = Field(
        4, ge=2, le=1000, description="of each source, holding equal amounts of text; q0 has the least"
    )


def run(settings: BucketSettings, source: Path, out: Path, crew: Crew, renew: bool = False) -> Flow:
    """Add the column `bucket` to every document: q0, q1 … by quantile within its source.

    Documents without a number (null, nan) go to q0 and are counted.

    Raises:  DataError if a part has no such column, or it does not hold numbers
    """
    if (schema := step_schema(source)) is not None:
        check(settings, schema, str(source))
    step = Step(out, KIND, VERSION, settings, [source], crew, renew=renew)
    if step.is_finished:
        return Flow.from_json(read_report(out))
    parts = step_parts(source)
    for path in parts:
        check(settings, read_schema(path), str(path))
    coarse = _histogram(step, parts, settings.by, "histogram")
    split = {name: _bounds(bins, settings.num_buckets) for name, bins in coarse.items()}
    wanted = {name: sorted({half for half, _ in places}) for name, places in split.items()}
    fine = _histogram(step, parts, settings.by, "refinement", wanted)
    bounds = {name: _refine(places, fine[name]) for name, places in split.items()}
    flows = step.map_parts(parts, partial(_assign, settings.by, bounds))
    values = {name: [_value(bound) for bound in each] for name, each in sorted(bounds.items())}
    return step.finish(flows, by=settings.by, upper_bounds=values)


def check(settings: BucketSettings, schema: pa.Schema, source: str) -> None:
    """Raises:  DataError unless documents with these columns can be ordered so"""
    if settings.by != LENGTH:
        check_number(schema, settings.by, "buckets.by", source)


def order_keys(values: NDArray[np.float64]) -> NDArray[np.uint32]:
    """Integers in the order of the numbers, those of a difference below a millionth being equal, uint32 [n].

    They are the leading half of the float64's bits, with the sign folded. nan comes first.
    """
    values = np.where(np.isnan(values), -np.inf, values + 0.0)  # -0.0 becomes 0.0
    bits = np.ascontiguousarray(values).view(np.uint64)
    sign = np.uint64(1 << 63)
    ordered = np.where(bits & sign != 0, ~bits, bits | sign)
    return (ordered >> np.uint64(32)).astype(np.uint32)


def _value(key: int) -> float | None:
    """The least number with a key; None for those that stand at the ends, which JSON has no word for."""
    bits = key << 32
    bits = bits ^ (1 << 63) if bits >> 63 else ~bits & (1 << 64) - 1
    value = float(np.array([bits], dtype=np.uint64).view(np.float64)[0])
    return value if np.isfinite(value) else None


def _keys(batch: pa.RecordBatch, by: str) -> tuple[NDArray[np.uint32], int]:
    """The key of each row, and how many rows have no number."""
    if by == LENGTH:
        return order_keys(texts(batch.column("text")).sizes.astype(np.float64)), 0
    values = batch.column(by).cast(pa.float64(), safe=False).fill_null(float("nan"))
    numbers = values.to_numpy(zero_copy_only=False)
    return order_keys(numbers), int(np.isnan(numbers).sum())


def _histogram(
    step: Step, parts: Sequence[Path], by: str, phase: str, wanted: Mapping[str, Sequence[int]] | None = None
) -> Histogram:
    """Bytes of text of all parts by source and the leading half of the key; with `wanted` leading halves by
    source, by the whole key of the documents that have one of these."""
    total: Histogram = {}
    for counts in step.run(phase, part_tasks(parts, partial(_count, by, wanted))):
        for source, bins in counts.items():
            mine = total.setdefault(source, {})
            for key, size in bins.items():
                mine[int(key)] = mine.get(int(key), 0) + size
    return total


def _count(by: str, wanted: Mapping[str, Sequence[int]] | None, path: Path) -> dict[str, Any]:
    found: dict[str, dict[int, int]] = {}
    columns = ["source", "text"] if by == LENGTH else ["source", "text", by]
    for batch in read_part(path, columns):
        keys, sizes = _keys(batch, by)[0], texts(batch.column("text")).sizes
        coarse = keys >> np.uint32(16)
        for source, rows in rows_by_source(batch):
            counted = coarse[rows]
            mine = sizes[rows]
            if wanted is not None:
                is_wanted = np.isin(counted, np.array(wanted[source], dtype=np.uint32))
                counted, mine = keys[rows][is_wanted], mine[is_wanted]
            unique, inverse = np.unique(counted, return_inverse=True)
            sums = np.zeros(len(unique), dtype=np.int64)
            np.add.at(sums, inverse, mine)
            bins = found.setdefault(source, {})
            for key, size in zip(unique.tolist(), sums.tolist(), strict=True):
                bins[key] = bins.get(key, 0) + size
    return {source: {str(key): bins[key] for key in sorted(bins)} for source, bins in sorted(found.items())}


def _bounds(bins: Mapping[int, int], num_buckets: int) -> list[tuple[int, int]]:
    """For each bound between buckets the leading half it lies in, and the bytes below it that are there."""
    keys = sorted(bins)
    ends = np.cumsum([bins[key] for key in keys])
    targets = [int(ends[-1]) * number // num_buckets for number in range(1, num_buckets)]
    places = np.searchsorted(ends, targets, side="left").tolist()
    return [
        (keys[place], target - int(ends[place]) + bins[keys[place]])
        for place, target in zip(places, targets, strict=True)
    ]


def _refine(bounds: Sequence[tuple[int, int]], bins: Mapping[int, int]) -> list[int]:
    """Each bound as the highest key of its bucket, ascending; equal ones leave buckets empty."""
    found = []
    for coarse, rest in bounds:
        keys = sorted(key for key in bins if key >> 16 == coarse)
        ends = np.cumsum([bins[key] for key in keys])
        found.append(keys[int(np.searchsorted(ends, rest, side="left"))])
    return found


def _assign(by: str, bounds: Mapping[str, Sequence[int]], path: Path, flow: Flow) -> Iterator[pa.RecordBatch]:
    for batch in read_part(path):
        keys, without = _keys(batch, by)
        flow.count("documents without a number, in q0", without)
        number = np.zeros(batch.num_rows, dtype=np.int64)
        for source, rows in rows_by_source(batch):
            number[rows] = np.searchsorted(np.array(bounds[source], dtype=np.uint32), keys[rows], side="left")
            counts = np.bincount(number[rows])
            for bucket in np.flatnonzero(counts).tolist():
                flow.count(f"documents in {source}.q{bucket}", int(counts[bucket]))
        flow.pass_batch(batch, np.full(batch.num_rows, KEPT), [])
        names = pa.array([f"q{bucket}" for bucket in range(int(number.max(initial=0)) + 1)], pa.string())
        yield with_column(batch, BUCKET, names.take(pa.array(number)))
