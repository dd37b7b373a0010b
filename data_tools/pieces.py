"""Pieces of datasets: each task encodes some parts and writes their documents by group; then all are joined.

pieces/PIECE/GROUP/{train,valid}            datasets of one task
pieces/PIECE/GROUP/{train,valid}.counts     how often each token occurs in them, int64 [vocab_size]
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import get_ident
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_tools.bpe import Encoded
from data_tools.documents import BUCKET, read_part, read_schema, texts
from data_tools.encoding import Encoder, SampleCheck, build_encoder
from data_tools.flow import EXAMPLES, KEPT, Flow
from data_tools.hold_out import DATA, TRAIN, VALID, Split, group_names, unigram_entropy
from megalite.data.folder import disk_errors
from megalite.data.staging import fsync
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.data.writer import ShardWriter, join_datasets

PIECES, TOKENIZER = "pieces", "tokenizer"  # folders of the step, beside hold_out.DATA


class Job(NamedTuple):
    """How every task of the step works."""

    folder: Path
    fingerprint: str  # of the tokenizer saved there
    vocab_size: int
    engine: str
    split: Split
    compression: str | None


def part_columns(path: Path) -> list[str]:
    """What is read of a part."""
    return ["id", "source", "text", *([BUCKET] if BUCKET in read_schema(path).names else [])]


def write_piece(job: Job, name: str, paths: Sequence[Path]) -> dict[str, Any]:
    """Encode parts and write one piece. Returns its flow, its counts by group, and what the check found."""
    folder = job.folder / PIECES / name
    tokenizer, encoder = _at_work(job.folder / TOKENIZER, job.fingerprint, job.engine, get_ident())
    check = SampleCheck(tokenizer, encoder, job.engine)
    flow = Flow()
    examples: list[str] = []
    with disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    with ExitStack() as stack:
        datasets = _Datasets(folder, tokenizer, job, stack)
        for path in paths:
            for batch in read_part(path, part_columns(path)):
                column = texts(batch.column("text"))
                encoded = encoder.encode(column)
                examples += [batch.column("id")[row].as_py() for row in check.look(column, encoded)]
                datasets.write(batch, column.sizes, encoded)
                flow.pass_batch(batch, np.full(batch.num_rows, KEPT), [])
    groups = datasets.finish()
    checked = {"checked": check.checked, "different": check.different, "examples": examples[:EXAMPLES]}
    return {"flow": flow.to_json(), "groups": groups, **checked}


def join_group(job: Job, group: str, pieces: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Join a group's `pieces`, names by train and valid, to its datasets. Returns their counts.

    May be killed and called again.
    """
    frequency = {}
    for kind, names in pieces.items():
        parts = [job.folder / PIECES / name / group / kind for name in names]
        target = job.folder / DATA / group / kind
        # It appears when it is whole; what it is made of goes after that.
        if parts and not target.exists():
            with disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            join_datasets(parts, target)
        frequency[kind] = np.zeros(job.vocab_size, np.int64)
        for part in parts:
            with disk_errors(part):
                frequency[kind] += np.fromfile(_counts_file(part), np.int64)
    has_both = all(counts.any() for counts in frequency.values())
    return {"unigram_entropy": unigram_entropy(frequency[TRAIN], frequency[VALID]) if has_both else None}


@lru_cache(maxsize=2)
def _at_work(folder: Path, fingerprint: str, engine: str, thread: int) -> tuple[Tokenizer, Encoder]:
    """One encoder a thread, for it remembers from task to task. The fingerprint tells other content apart."""
    tokenizer = load_tokenizer(folder)
    return tokenizer, build_encoder(tokenizer, engine)


def _counts_file(dataset: Path) -> Path:
    return dataset.with_name(f"{dataset.name}.counts")


@dataclass
class _Open:
    """A dataset being written."""

    writer: ShardWriter
    path: Path
    frequency: NDArray[np.int64]
    documents: int = 0
    bytes: int = 0


class _Datasets:
    """The datasets of a piece, opened when the first document comes and closed by the stack."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, job: Job, stack: ExitStack) -> None:
        self._folder, self._tokenizer, self._job, self._stack = folder, tokenizer, job, stack
        self._open: dict[tuple[str, str], _Open] = {}

    def write(self, batch: pa.RecordBatch, sizes: NDArray[np.int64], encoded: Encoded) -> None:
        """Sort the documents of a batch, with the bytes of their texts, into their datasets."""
        ids, bounds = encoded
        rows: dict[tuple[str, str], list[int]] = {}
        names, sources = batch.column("id").to_pylist(), batch.column("source").to_pylist()
        for row, (group, source, name) in enumerate(zip(group_names(batch), sources, names, strict=True)):
            kind = VALID if self._job.split.is_held_out(group, source, name) else TRAIN
            dataset = self._dataset(group, kind)
            dataset.writer.write(name, source, ids[bounds[row] : bounds[row + 1]])
            rows.setdefault((group, kind), []).append(row)
        lengths = np.diff(bounds)
        for key, inside in rows.items():
            dataset = self._open[key]
            is_inside = np.zeros(batch.num_rows, dtype=bool)
            is_inside[inside] = True
            mine = ids if len(inside) == batch.num_rows else ids[np.repeat(is_inside, lengths)]
            dataset.frequency += np.bincount(mine, minlength=dataset.frequency.size)
            dataset.documents += len(inside)
            dataset.bytes += int(sizes[is_inside].sum())

    def finish(self) -> dict[str, dict[str, dict[str, int]]]:
        """Keep the frequencies once the datasets are closed; counts by group and kind."""
        groups: dict[str, dict[str, dict[str, int]]] = {}
        for (group, kind), dataset in sorted(self._open.items()):
            file = _counts_file(dataset.path)
            with disk_errors(file):
                dataset.frequency.tofile(file)
                fsync(file)
            groups.setdefault(group, {})[kind] = {
                "documents": dataset.documents,
                "tokens": int(dataset.frequency.sum()),
                "bytes": dataset.bytes,
            }
        return groups

    def _dataset(self, group: str, kind: str) -> _Open:
        if (found := self._open.get((group, kind))) is None:
            path = self._folder / group / kind
            writer = ShardWriter(path, self._tokenizer, compression=self._job.compression)
            frequency = np.zeros(self._tokenizer.vocab_size, np.int64)
            found = _Open(self._stack.enter_context(writer), path, frequency)
            self._open[group, kind] = found
        return found
