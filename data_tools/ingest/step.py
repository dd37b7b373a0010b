"""The first step: every source's text as parts, what is no document set aside and counted.

read/000000-0000.parquet …   what a task has read, in pieces of a part's size; gone when parts/ is there
parts/part-000000.parquet …  the same, in one order
aside/000000.jsonl …         what a task set aside, if anything
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools.crew import Crew, Task
from data_tools.documents import SCHEMA, PartWriter, part_name, text_column
from data_tools.flow import Flow
from data_tools.ingest.aside import FOLDER, AsideWriter, head_text
from data_tools.ingest.found import Document, Note, SetAside, meta_json
from data_tools.ingest.plan import Piece, check, divide, list_source
from data_tools.ingest.readers import read_piece
from data_tools.ingest.settings import IngestSettings, SourceSettings
from data_tools.step import PARTS, Step, read_report
from megalite.data.folder import disk_errors
from megalite.data.staging import fsync
from megalite.errors import DataError

KIND = "ingest"
VERSION = 1
PART_BYTES = 128 << 20  # of text; then the next part begins
BATCH_BYTES, BATCH_ROWS = 1 << 20, 4096
PHASE = "read"


def run(settings: IngestSettings, out: Path, crew: Crew, renew: bool = False) -> Flow:
    """Read every source into `out`; at once if that is done and no file has changed since.

    Raises:  DataError if a place is missing or empty, a table has not the columns, a package is missing;
    or, when all is read, if there was no document in a source
    """
    listings = [(source, list_source(source)) for source in settings.sources]
    for source, listing in listings:
        check(source, listing)
    inputs = [listing.fingerprint(source) for source, listing in listings]
    step = Step(out, KIND, VERSION, settings, inputs, crew, renew=renew)
    if step.is_finished:
        return Flow.from_json(read_report(out))
    work = [(source, pieces) for source, listing in listings for pieces in divide(listing.pieces)]
    tasks = [
        Task(
            f"{number:06d}",
            partial(_read, source, pieces, out, f"{number:06d}"),
            sum((piece.end or piece.size) - piece.start for piece in pieces),
        )
        for number, (source, pieces) in enumerate(work)
    ]
    flows = [Flow.from_json(result) for result in step.run(PHASE, tasks)]
    step.once("parts", partial(_number_parts, out))
    if crew.is_first:  # only now, for numbering that was killed begins anew
        shutil.rmtree(out / PHASE, ignore_errors=True)
    passed_over = Flow()
    for _, listing in listings:
        for what, number in sorted(listing.passed_over.items()):
            if number:
                passed_over.count(what, number)
    _refuse_empty(settings, flows, out)
    return step.finish([*flows, passed_over])


def _read(source: SourceSettings, pieces: list[Piece], out: Path, name: str) -> dict[str, Any]:
    """One task: its parts, its file of what is set aside, and the counts of both."""
    flow = Flow()
    with AsideWriter(out / FOLDER / f"{name}.jsonl") as aside:
        batches = _batches(source, pieces, aside, flow)
        batch = next(batches, None)
        number = 0
        while batch is not None:
            with PartWriter(out / PHASE / f"{name}-{number:04}.parquet") as writer:
                size = 0
                while batch is not None and size < PART_BYTES:
                    writer.write(batch)
                    size += batch.column("text").nbytes
                    batch = next(batches, None)
            number += 1
    return flow.to_json()


def _number_parts(out: Path) -> dict[str, Any]:
    """Give every piece its place among all, without copying it."""
    parts = out / PARTS
    pieces = sorted((out / PHASE).glob("*-*.parquet"))
    with disk_errors(parts):
        parts.mkdir(exist_ok=True)
        for number, piece in enumerate(pieces):
            target = parts / part_name(number)
            target.unlink(missing_ok=True)
            os.link(piece, target)
        fsync(parts)
    return {"parts": len(pieces)}


def _batches(
    source: SourceSettings, pieces: list[Piece], aside: AsideWriter, flow: Flow
) -> Iterator[pa.RecordBatch]:
    """The pieces' documents by the MiB."""
    documents: list[Document] = []
    metas: list[str | None] = []
    size = 0
    for piece in pieces:
        for found in read_piece(piece, source):
            if isinstance(found, Document):
                documents.append(found)
                metas.append(_meta(source, found, flow))
                size += len(found.text) + len(metas[-1] or "")
                if size >= BATCH_BYTES or len(documents) == BATCH_ROWS:
                    yield _batch(source, documents, metas, flow)
                    documents, metas, size = [], [], 0
            elif isinstance(found, SetAside):
                flow.drop(
                    source.name, str(found.reason), found.size, found.place, head_text(found), found.why
                )
                aside.write(source.name, found)
            elif isinstance(found, Note):
                flow.count(found.what, found.number)
    if documents:
        yield _batch(source, documents, metas, flow)


def _meta(source: SourceSettings, document: Document, flow: Flow) -> str | None:
    if document.meta is None:
        return None
    text, left_out = meta_json(document.meta, source.max_meta_bytes)
    if left_out:
        flow.count("meta fields left out over max_meta_bytes", left_out)
    return text


def _batch(
    source: SourceSettings, documents: list[Document], metas: list[str | None], flow: Flow
) -> pa.RecordBatch:
    offsets = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum([len(document.text) for document in documents], out=offsets[1:])
    batch = pa.RecordBatch.from_arrays(
        [
            pa.array([document.doc_id for document in documents], pa.string()),
            pa.repeat(source.name, len(documents)).cast(pa.string()),
            text_column(np.frombuffer(b"".join(document.text for document in documents), np.uint8), offsets),
            pa.array(metas, pa.string()),
        ],
        schema=SCHEMA,
    )
    raw = sum(document.raw_bytes or len(document.text) for document in documents)
    flow.keep(source.name, raw, int(offsets[-1]), documents=len(documents))
    flow.tally_lengths(batch)
    return batch


def _refuse_empty(settings: IngestSettings, flows: list[Flow], out: Path) -> None:
    """Raises:  DataError if nothing of a source could be read"""
    total = Flow()
    for flow in flows:
        total.merge(flow)
    for source in settings.sources:
        counts = total.sources.get(source.name, {"out_documents": 0, "dropped": {}})
        if not counts["out_documents"]:
            dropped = {reason: item["documents"] for reason, item in sorted(counts["dropped"].items())}
            told = ", ".join(f"{number} {reason}" for reason, number in dropped.items()) or "no document"
            raise DataError(
                f"no text in source {source.name!r}: {source.path} has {told}; see {out / FOLDER}"
            )
