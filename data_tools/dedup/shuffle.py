"""Bring together what belongs together: every task writes rows by bucket, one task reads a whole bucket.

A task writes one file. In it are runs, each a stretch of rows sorted by bucket, then the bounds of every
bucket in every run, then how many runs and buckets there are; all of it uint64. So memory is bounded by a
run, a phase makes as many files as it has tasks, and a bucket is read by one seek a run.

Rows keep the order in which they were written: files in the order named, and within one as it was made.
Files are for the machine that made them, or its like: bytes are in native order.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from data_tools.crew import Task
from megalite.data.folder import disk_errors
from megalite.data.staging import commit_file, staging_of
from megalite.errors import DataError

RUN_BYTES = 32 << 20  # of rows, held before they are sorted and written
WORKING_COPIES = 4  # of a bucket: rows as read, keys, order, and what is made of them
ADDRESS_BITS = 40  # an address: a part's number above, a row's or unit's number in it below

# Rows of one width [rows, columns], or of any, one array each.
Rows = NDArray[np.uint64] | Sequence[NDArray[np.uint64]]


def bucket_count(total_bytes: int, memory_bytes: int) -> int:
    """How many buckets keep the work on one below `memory_bytes`, if rows spread evenly."""
    return max(1, -(-total_bytes * WORKING_COPIES // memory_bytes))


def bucket_of(hashes: NDArray[np.uint64], buckets: int) -> NDArray[np.int64]:
    """The bucket of each hash: its upper half scaled to [0, buckets)."""
    return (((hashes >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)).astype(np.int64)


def addresses(part: int, numbers: NDArray[np.integer]) -> NDArray[np.uint64]:
    """The addresses of these rows or units of a part; in their order is the order of the corpus."""
    return (np.uint64(part) << np.uint64(ADDRESS_BITS)) | numbers.astype(np.uint64)


def part_of(address: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The part's number of each address."""
    return (address >> np.uint64(ADDRESS_BITS)).astype(np.int64)


def number_of(address: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The row's or unit's number in its part of each address."""
    return (address & np.uint64((1 << ADDRESS_BITS) - 1)).astype(np.int64)


def bucket_tasks(buckets: int, work: Callable[[int], dict[str, Any]]) -> list[Task]:
    """A task for each bucket: `work(bucket)`."""
    return [Task(bucket_name(bucket), partial(work, bucket)) for bucket in range(buckets)]


def bucket_name(bucket: int) -> str:
    """What the task of a bucket is called; names sort as numbers do, up to a million."""
    return f"bucket-{bucket:06d}"


def shuffle_files(folder: Path, count: int) -> list[Path]:
    """The files of a phase of `count` tasks, in task order.

    Raises:  DataError if some are missing
    """
    files = sorted(folder.glob("*.bin"))
    if len(files) != count:
        raise DataError(
            f"{folder} has {len(files)} of {count} files; remove its step's folder, and run again"
        )
    return files


class ShuffleWriter:
    """Write rows to buckets; the file appears under its name when the `with` block ends without an exception.

    Raises:  DataError if the disk refuses
    """

    def __init__(self, path: Path, buckets: int) -> None:
        self._path, self._buckets = path, buckets
        self._staging = staging_of(path)
        self._file: BinaryIO | None = None
        self._pending: list[tuple[NDArray[np.int64], Rows]] = []
        self._words = self._written = 0
        self._bounds: list[NDArray[np.int64]] = []

    def __enter__(self) -> Self:
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._staging.open("wb")
        return self

    def write(self, buckets: NDArray[np.int64], rows: Rows) -> None:
        """Append rows to their buckets, int64 [rows]."""
        self._pending.append((buckets, rows))
        self._words += rows.size if isinstance(rows, np.ndarray) else sum(row.size for row in rows)
        if self._words * 8 >= RUN_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._file is None or not self._words:
            return
        buckets = np.concatenate([some for some, _ in self._pending])
        order = np.argsort(buckets, kind="stable")
        rows = [rows for _, rows in self._pending]
        if all(isinstance(some, np.ndarray) for some in rows):
            together = np.concatenate(rows)
            flat = together[order].ravel()
            sizes = np.full(len(order), together.shape[1])
        else:
            each = [row for some in rows for row in some]
            flat = np.concatenate([each[index] for index in order.tolist()])
            sizes = np.array([row.size for row in each], dtype=np.int64)[order]
        by_bucket = np.bincount(buckets[order], sizes, self._buckets).astype(np.int64)
        bounds = np.concatenate([[0], np.cumsum(by_bucket)])
        with disk_errors(self._path):
            flat.tofile(self._file)
        self._bounds.append(bounds + self._written)
        self._written += flat.size
        self._pending, self._words = [], 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
            if self._file is not None:
                with disk_errors(self._path):
                    for bounds in [*self._bounds, np.array([len(self._bounds), self._buckets])]:
                        bounds.tofile(self._file)
                    self._file.close()
                    if kind is None:
                        commit_file(self._staging, self._path)
        finally:
            self._staging.unlink(missing_ok=True)


def read_bucket(
    files: Sequence[Path], bucket: int, memory_bytes: int | None = None, spill: Path | None = None
) -> NDArray[np.uint64]:
    """All rows of a bucket, end to end, uint64 [words].

    One larger than `memory_bytes` is joined in the file `spill` and mapped from there, so that it is the
    page cache that holds it; the file is the caller's to remove.

    Raises:  DataError naming a file that is missing or not whole
    """
    spans = [(path, *span) for path in files for span in _spans(path, bucket)]
    words = sum(stop - start for _, start, stop in spans)
    if not words:
        return np.zeros(0, dtype=np.uint64)
    if spill is None or memory_bytes is None or words * 8 <= memory_bytes:
        out = np.empty(words, dtype=np.uint64)
    else:
        with disk_errors(spill):
            out = np.memmap(spill, np.uint64, "w+", shape=(words,)).view(np.ndarray)
    at = 0
    for path, start, stop in spans:
        with disk_errors(path, "read"), path.open("rb") as file:
            file.seek(start * 8)
            if file.readinto(out[at : at + stop - start].data) != (stop - start) * 8:
                raise DataError(f"{path} is cut short; remove its step's folder, and run again")
        at += stop - start
    return out


def read_rows(files: Sequence[Path], bucket: int, columns: int) -> NDArray[np.uint64]:
    """All rows of a bucket where they have one width, uint64 [rows, columns]."""
    return read_bucket(files, bucket).reshape(-1, columns)


def remove_shuffle(folder: Path) -> None:
    """Remove the files of a phase whose readers are done; a killed removal is taken up again."""
    with disk_errors(folder, "remove"):
        if folder.exists():
            shutil.rmtree(folder)


def _spans(path: Path, bucket: int) -> list[tuple[int, int]]:
    """Where a bucket lies in a file, in words, in each run."""
    try:
        with path.open("rb") as file:
            size = file.seek(-16, os.SEEK_END) + 16
            runs, buckets = np.frombuffer(file.read(16), dtype=np.int64).tolist()
            table = size - 16 - runs * (buckets + 1) * 8
            spans = []
            for run in range(runs):
                file.seek(table + (run * (buckets + 1) + bucket) * 8)
                start, stop = np.frombuffer(file.read(16), dtype=np.int64).tolist()
                spans.append((start, stop))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; remove its step's folder, and run again") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); remove its step's folder, and run again") from None
    return spans
