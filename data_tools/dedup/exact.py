"""Keep the first of equal documents, paragraphs or lines, in the order of the corpus.

Equal means an equal 128-bit hash. Among n units a pair of unequal ones has equal hashes with probability
n² / 2¹²⁹, 10⁻¹⁹ for 10¹⁰ units, unless texts were made to collide: the hash is fast, not cryptographic.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from data_tools.crew import Crew
from data_tools.dedup import removal, repeats
from data_tools.dedup.cut import cut_out, show_cuts
from data_tools.dedup.removal import EXACT, drop_twins, removals
from data_tools.dedup.repeats import later_occurrences
from data_tools.dedup.shuffle import (
    ShuffleWriter,
    addresses,
    bucket_count,
    bucket_name,
    bucket_of,
    bucket_tasks,
    number_of,
    part_of,
    read_rows,
    remove_shuffle,
    shuffle_files,
)
from data_tools.dedup.units import Units, document_units, hash_units, split_units
from data_tools.documents import Texts, part_number, read_part, text_column, texts, with_column
from data_tools.flow import KEPT, Flow
from data_tools.step import Step, part_tasks, read_report, step_parts
from megalite.config.section import Section

KIND = "exact-dedup"
VERSION = 2
BYTES_A_LINE = 32  # of text at least, taken over a corpus: for the number of buckets, not for correctness
EMPTY = "nothing left"


class ExactSettings(Section):
    """Which equal things are kept once."""

    unit: Literal["document", "paragraph", "line"] = Field(
        "document", description="what is compared; a paragraph ends at a blank line"
    )
    normalise: bool = Field(
        False, description="compare in lower case, with runs of spaces as one space and none at the ends"
    )
    min_chars: int = Field(
        30, ge=1, description="shorter paragraphs and lines are kept, however often they occur; characters"
    )
    memory_bytes: int = Field(
        1 << 30, ge=1 << 10, description="memory of one worker for matching hashes, which sets how many files"
    )


def run(settings: ExactSettings, source: Path, out: Path, crew: Crew, renew: bool = False) -> Flow:
    """Write the source's parts without what occurred before. Memory: `memory_bytes` or a row group."""
    step = Step(out, KIND, VERSION, settings, [source], crew, renew=renew)
    if step.is_finished:
        return Flow.from_json(read_report(out))
    parts = step_parts(source)
    _, documents, _, size = Flow.from_json(read_report(source)).totals()
    units = documents if settings.unit == "document" else documents + size // BYTES_A_LINE
    buckets = bucket_count(units * repeats.COLUMNS * 8, settings.memory_bytes)
    hashes, matches = out / "shuffle" / "hashes", out / "shuffle" / "matches"
    step.run("hashes", part_tasks(parts, partial(_hash_part, settings, hashes, buckets)))
    numbers = 1 + max(map(part_number, parts), default=0)
    step.run("matches", bucket_tasks(buckets, partial(_match, hashes, len(parts), matches, numbers)))
    if crew.is_first:
        remove_shuffle(hashes)
    if settings.unit == "document":
        flows = step.map_parts(parts, partial(drop_twins, matches, buckets, EXACT))
    else:
        flows = step.map_parts(parts, partial(_cut_repeats, settings, matches, buckets))
    if crew.is_first:
        remove_shuffle(out / "shuffle")
    return step.finish(flows)


def _hash_part(settings: ExactSettings, folder: Path, buckets: int, path: Path) -> dict[str, Any]:
    """Write (hash, hash, address) of every unit long enough to be compared; addresses count all units."""
    part, count = part_number(path), 0
    with ShuffleWriter(folder / f"{path.stem}.bin", buckets) as writer:
        for batch in read_part(path, ["text"]):
            text = texts(batch.column("text"))
            units = _units(settings, text)
            hashes = hash_units(text.data, units, normalise=settings.normalise)
            where = addresses(part, np.arange(count, count + len(hashes)))
            records = np.column_stack([hashes, where])
            if settings.unit != "document":
                records = records[units.chars >= settings.min_chars]
            writer.write(bucket_of(records[:, 0], buckets), records)
            count += len(hashes)
    return {"units": count}


def _match(hashes: Path, files: int, folder: Path, parts: int, bucket: int) -> dict[str, Any]:
    """Write what is to be removed from each part."""
    found = later_occurrences(read_rows(shuffle_files(hashes, files), bucket, repeats.COLUMNS))
    with ShuffleWriter(folder / f"{bucket_name(bucket)}.bin", parts) as writer:
        rows = removals(found[:, 0], found[:, 1], np.ones(len(found)))
        writer.write(part_of(found[:, 0]), rows)
    return {"repeats": len(found)}


def _units(settings: ExactSettings, text: Texts) -> Units:
    if settings.unit == "document":
        return document_units(text)
    return split_units(text, paragraphs=settings.unit == "paragraph")


def _cut_repeats(
    settings: ExactSettings, matches: Path, buckets: int, path: Path, flow: Flow
) -> Iterator[pa.RecordBatch]:
    """A step's transform: the part's texts without the units found, and without documents of nothing else."""
    rows = read_rows(shuffle_files(matches, buckets), part_number(path), removal.COLUMNS)
    numbers = np.sort(number_of(rows[:, 0]))
    count = 0
    for batch in read_part(path):
        text = texts(batch.column("text"))
        units = _units(settings, text)
        first, last = np.searchsorted(numbers, [count, count + len(units.spans)])
        gone = numbers[first:last] - count
        starts, ends = units.spans[gone, 0], units.spans[gone, 1]
        left = cut_out(text, starts, ends)
        changed = with_column(batch, "text", text_column(*left))
        verdicts = np.full(batch.num_rows, KEPT)
        in_row = np.searchsorted(units.bounds, gone, side="right") - 1
        for row in np.unique(in_row).tolist():
            if not changed.column("text")[row].as_py().strip():
                verdicts[row] = 0
        out = changed.filter(pa.array(verdicts == KEPT)) if (verdicts != KEPT).any() else changed
        why = [f"every {settings.unit} of it occurs earlier"] * batch.num_rows
        flow.pass_batch(batch, verdicts, [EMPTY], out, why)
        flow.count(f"{settings.unit}s removed", len(gone))
        flow.count("bytes removed", int((ends - starts).sum()))
        flow.count("documents cut", len(np.unique(in_row)))
        show_cuts(flow, f"repeated {settings.unit}", batch, in_row, starts, ends)
        yield out
        count += len(units.spans)
