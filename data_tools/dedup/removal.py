"""Leave out the documents that were found to be another's twin, and say whose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_tools.dedup.cut import first_of_each_source
from data_tools.dedup.shuffle import addresses, number_of, part_of, read_rows, shuffle_files
from data_tools.documents import part_name, part_number, read_part
from data_tools.flow import KEPT, Flow

EXACT = "exact duplicate"  # a reason
COLUMNS = 3  # a removal: the address of what goes, the address of what stays, their similarity's float64 bits


def removals(
    gone: NDArray[np.uint64], kept: NDArray[np.uint64], similarity: NDArray[np.float64]
) -> NDArray[np.uint64]:
    """Rows of removals, uint64 [removals, 3]."""
    return np.stack([gone, kept, np.ascontiguousarray(similarity).view(np.uint64)], axis=1)


def drop_twins(folder: Path, files: int, reason: str, path: Path, flow: Flow) -> Iterator[pa.RecordBatch]:
    """A step's transform: the part without the rows that the removals in the shuffle `folder` name.

    Unless they are exact, similarities are told with the examples, and tallied for all by steps of 0.05.
    """
    part = part_number(path)
    rows = read_rows(shuffle_files(folder, files), part, COLUMNS)
    rows = rows[np.argsort(rows[:, 0])]
    similarity = np.ascontiguousarray(rows[:, 2]).view(np.float64)
    if reason != EXACT:
        steps = np.floor(similarity * 20 + 1e-9) / 20
        flow.tally("Jaccard of the removed with the kept", (f"{step:.2f}" for step in steps.tolist()))
    start = 0
    for batch in read_part(path):
        bounds = addresses(part, np.array([start, start + batch.num_rows]))
        first, last = np.searchsorted(rows[:, 0], bounds).tolist()
        gone = number_of(rows[first:last, 0]) - start
        verdicts = np.full(batch.num_rows, KEPT)
        verdicts[gone] = 0
        out = batch.filter(pa.array(verdicts == KEPT)) if len(gone) else batch
        why = [""] * batch.num_rows
        for place in first_of_each_source(batch, gone):
            twin, likeness = _id_at(path, rows[first + place, 1]), similarity[first + place]
            why[gone[place]] = f"same as {twin}" if reason == EXACT else f"Jaccard {likeness:.3f} with {twin}"
        flow.pass_batch(batch, verdicts, [reason], out, why)
        yield out
        start += batch.num_rows


def _id_at(path: Path, address: np.uint64) -> str:
    """The id of a document of this part or of one beside it."""
    where = np.array([address])
    row = int(number_of(where)[0])
    for batch in read_part(path.with_name(part_name(int(part_of(where)[0]))), ["id"]):
        if row < batch.num_rows:
            return str(batch.column("id")[row].as_py())
        row -= batch.num_rows
    raise IndexError(f"{path} has no row {row}")
