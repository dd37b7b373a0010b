"""Small corpora as parts, for the tests of the steps that read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa

from data_tools import documents
from data_tools.crew import Crew, Place
from data_tools.documents import SCHEMA, PartWriter, part_name, read_part
from data_tools.flow import Flow
from data_tools.step import Step, step_parts
from megalite.config.section import Section


class Nothing(Section):
    """A step without settings."""


def write_step(folder: Path, parts: Sequence[Sequence[tuple[str, str, str]]]) -> Path:
    """A finished step with these parts of (id, source, text) rows."""
    rows = [[dict(zip(("id", "source", "text"), row, strict=True)) for row in part] for part in parts]
    return write_rows(folder, rows)


def write_rows(folder: Path, parts: Sequence[Sequence[dict[str, Any]]], schema: pa.Schema = SCHEMA) -> Path:
    """A finished step with these parts of rows by column; columns left out are null.

    A part is read in batches of three rows, as one of millions is read in batches of 65,536.
    """
    with Crew(folder, workers=1) as crew:
        step = Step(folder, "test", 1, Nothing(), [], crew)
        flow = Flow()
        for number, part in enumerate(parts):
            batch = pa.RecordBatch.from_pylist(list(part), schema)
            with (
                patch.object(documents, "GROUP_ROWS", 3),
                PartWriter(folder / "parts" / part_name(number), schema) as writer,
            ):
                writer.write(batch)
            for row in part:
                flow.keep(row["source"], len(row["text"].encode()))
        step.finish([flow])
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Every row of a finished step, in order."""
    return [row for path in step_parts(folder) for batch in read_part(path) for row in batch.to_pylist()]


def texts_of(folder: Path) -> list[str]:
    """Every text of a finished step, in order."""
    return [row["text"] for row in rows_of(folder)]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by name, but for those that may differ between equal runs."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timing.json" and "ranks" not in path.parts
    }


def crew(root: Path, workers: int = 1, rank: int = 0, world: int = 1) -> Crew:
    """A crew of one process, unless told otherwise."""
    return Crew(root, workers, Place(rank, world))
