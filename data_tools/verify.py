"""Check every byte of a dataset on all cores, and name everything that is wrong."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from megalite.data.folder import REMEDY
from megalite.data.manifest import BYTES, MANIFEST_FILE
from megalite.data.shards import CorruptBlockError, Dataset
from megalite.errors import DataError
from megalite.progress import progress

TASK_BYTES = 64 << 20  # checked at a stretch by one thread; Arrow, numpy and zlib run beside each other


class _Task(NamedTuple):
    """A shard's whole file, or its blocks [start, stop) if there are any; `bytes` of work."""

    shard: int
    start: int
    stop: int
    bytes: int


def find_faults(
    dataset: Dataset, update: Callable[[int, int], None] | None = None, threads: int | None = None
) -> list[DataError]:
    """Each file against its CRC and each record batch by all that reading checks; what is wrong, in order.

    `update(done, total)` is called with bytes as the check goes on.
    """
    tasks = list(_tasks(dataset))
    total, done = sum(task.bytes for task in tasks), 0
    pool = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)))
    try:
        running = {pool.submit(_check, dataset, task): task for task in tasks}
        for future in as_completed(running):
            done += running[future].bytes
            if update is not None:
                update(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    faults = {str(fault): fault for future in running for fault in future.result()}
    return list(faults.values())  # a shard that is missing says so only once


def run(path: str | Path) -> int:
    """Check a dataset, or every dataset of a folder, and print the outcome.

    Raises:  DataError if anything is wrong, after naming it all
    """
    folders = [path]
    if isinstance(path, Path) and not (path / MANIFEST_FILE).exists():
        folders = [*sorted(found.parent for found in path.glob(f"*/{MANIFEST_FILE}"))] or folders
    damaged = []
    for folder in folders:
        dataset = Dataset(folder)
        with progress(f"verifying {folder}") as update:
            faults = find_faults(dataset, update)
        for fault in faults:
            print(fault)
        if faults:
            damaged.append(f"{folder} has {len(faults)} {'fault' if len(faults) == 1 else 'faults'}")
            continue
        print(
            f"{folder}: sound; {len(dataset.manifest.shards)} shards, {dataset.num_documents:,} documents, "
            f"{dataset.total_tokens:,} tokens, vocabulary {dataset.vocab_size:,}"
        )
    if damaged:
        raise DataError(f"{'; '.join(damaged)}, named above; {REMEDY}")
    return 0


def _tasks(dataset: Dataset) -> Iterator[_Task]:
    number = 0
    for n, shard in enumerate(dataset.manifest.shards):
        start, size = number, 0
        for batch_bytes in shard.batches[:, BYTES].tolist():
            number, size = number + 1, size + batch_bytes
            if size >= TASK_BYTES:
                yield _Task(n, start, number, size)
                start, size = number, 0
        if size:
            yield _Task(n, start, number, size)
        yield _Task(n, 0, 0, shard.bytes)


def _check(dataset: Dataset, task: _Task) -> list[DataError]:
    faults: list[DataError] = []
    try:
        for number in range(task.start, task.stop):
            try:
                dataset.block(number).check_names()
            except CorruptBlockError as error:
                faults.append(error)
        if task.start == task.stop:
            shard, crc = dataset.manifest.shards[task.shard], 0
            for chunk in dataset.file_chunks(task.shard):
                crc = zlib.crc32(chunk, crc)
            if crc != shard.crc32:
                where = f"{dataset.path}/{shard.file}"
                faults.append(
                    DataError(f"{where}: the file has CRC {crc:#010x}, expected {shard.crc32:#010x}")
                )
    except DataError as error:  # the whole shard is missing, of another size or out of reach
        faults.append(error)
    return faults
