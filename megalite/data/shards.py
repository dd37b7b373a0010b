"""The shard format: documents of token ids in Arrow files, written once, read by memory map.

A dataset is a folder:

    manifest.json                            counts, offsets and CRCs of everything below
    tokenizer.json [tokenizer_config.json]   what the ids mean
    shard_00000.arrow …                      Arrow IPC files, documents in stored order

A record batch has the columns `tokens: list<uint16 | uint32>`, `doc_id: string`, `source: string`;
one row is one document, its end-of-document token included. Any Arrow reader opens the files; this
one goes straight to a batch by its manifest offset and trusts a byte only after the batch's CRC.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megalite.data.ipc import check_declared_size, shard_schema
from megalite.data.manifest import (
    BYTES,
    CRC32,
    DOCUMENTS,
    OFFSET,
    TOKENS,
    TokenizerInfo,
    data_file,
    load_manifest,
)
from megalite.data.tokenizer import CONFIG_FILE, MAX_TOKENIZER_BYTES, TOKENIZER_FILE, fingerprint
from megalite.errors import DataError

OPEN_SHARDS = 64
OPEN_VIEWS = 256  # uncompressed batches: a few hundred bytes each, they point into the map
OPEN_DECODED = 128  # compressed batches: 256–512 KiB each

_REMEDY = "restore the file or rebuild the dataset"


class Document(NamedTuple):
    """One stored document: tokens uint16|uint32 [tokens], read-only, its eos included."""

    doc_id: str
    source: str
    tokens: NDArray[Any]


class _Batch(NamedTuple):
    """An opened record batch: tokens [n], offsets int32 [documents + 1] from 0 to n."""

    tokens: NDArray[Any]
    offsets: NDArray[np.int32]
    names: pa.RecordBatch


class Dataset:
    """A dataset folder, opened by its manifest alone and read as one long stream of tokens.

    The stream is every document in stored order. Shards are mapped when first touched, each record
    batch is checked (CRC, Arrow's own validation, counts, token range) when first opened, and only
    a bounded number of either stays open.

    Raises:  DataError if the folder, a file or the manifest is missing, truncated or at odds
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = load_manifest(self.path)
        self._schema = shard_schema(self.manifest.dtype)
        for shard in self.manifest.shards:
            file, size = data_file(self.path, shard.file)
            if size != shard.bytes:
                raise DataError(f"{file} has {size} bytes, expected {shard.bytes}; {_REMEDY}")
        self._check_tokenizer()
        shards = self.manifest.shards
        tokens = np.concatenate([shard.batches[:, TOKENS] for shard in shards])
        # Both are lists because bisect on a list is several times faster than numpy on one number.
        self._ends: list[int] = np.cumsum(tokens).tolist()
        self._place = [(s, b) for s, shard in enumerate(shards) for b in range(len(shard.batches))]
        self._verified = bytearray(len(self._place))
        self.total_tokens = self._ends[-1]
        self.num_documents = self.manifest.documents
        self._map = lru_cache(OPEN_SHARDS)(self._map_shard)
        views = OPEN_VIEWS if self.manifest.compression is None else OPEN_DECODED
        self._batch = lru_cache(views)(self._open_batch)

    @property
    def tokenizer(self) -> TokenizerInfo:
        """Kind, fingerprint, vocabulary size and eos id of the tokenizer the ids come from."""
        return self.manifest.tokenizer

    @property
    def vocab_size(self) -> int:
        """Every stored token is below this."""
        return self.manifest.tokenizer.vocab_size

    def read(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Tokens [start, stop) of the stream, and where documents begin among them.

        Shapes:  tokens uint16|uint32 [stop − start], read-only, a view of the file when uncompressed and
                 within one record batch; boundaries int64 [documents that begin here], relative to start
        Raises:  IndexError outside 0 ≤ start ≤ stop ≤ total_tokens; DataError on a corrupt batch
        """
        if not 0 <= start <= stop <= self.total_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.total_tokens} in {self.path}")
        parts, boundaries = [], []
        number, position = bisect_right(self._ends, start), start
        while position < stop:
            batch = self._batch(number)
            end = self._ends[number]
            begin = end - batch.tokens.size
            low, high = position - begin, min(stop, end) - begin
            parts.append(batch.tokens[low:high])
            # Keys of the array's own type: any other makes numpy convert the whole array first.
            first, last = batch.offsets[:-1].searchsorted(np.array((low, high), dtype=np.int32))
            boundaries.append(batch.offsets[first:last].astype(np.int64) + (begin - start))
            number, position = number + 1, end
        if len(parts) == 1:
            return parts[0], boundaries[0]
        if not parts:
            return np.empty(0, dtype=self.manifest.dtype), np.empty(0, dtype=np.int64)
        return np.concatenate(parts), np.concatenate(boundaries)

    def documents(self) -> Iterator[Document]:
        """Every document in stored order.

        Raises:  DataError on a corrupt batch
        """
        for number in range(len(self._place)):
            batch = self._batch(number)
            names, sources = (batch.names.column(c).to_pylist() for c in ("doc_id", "source"))
            for n, (doc_id, source) in enumerate(zip(names, sources, strict=True)):
                yield Document(doc_id, source, batch.tokens[batch.offsets[n] : batch.offsets[n + 1]])

    def _check_tokenizer(self) -> None:
        path, size = data_file(self.path, TOKENIZER_FILE)
        if size > MAX_TOKENIZER_BYTES:
            raise DataError(f"{path} has {size} bytes; a tokenizer has at most {MAX_TOKENIZER_BYTES}")
        found = fingerprint(path.read_bytes(), self.tokenizer.eos_id)
        if found != self.tokenizer.fingerprint:
            raise DataError(
                f"{path} is not the tokenizer of this dataset: fingerprint {found[:16]}…, the manifest says "
                f"{self.tokenizer.fingerprint[:16]}…; {_REMEDY}"
            )
        if (self.path / CONFIG_FILE).exists():
            data_file(self.path, CONFIG_FILE)

    def _map_shard(self, number: int) -> pa.Buffer:
        shard = self.manifest.shards[number]
        path, _ = data_file(self.path, shard.file)
        with disk_errors(path, "read"), pa.memory_map(str(path)) as file:
            buffer = file.read_buffer()
        if buffer.size != shard.bytes:
            raise DataError(f"{path} has {buffer.size} bytes, expected {shard.bytes}; {_REMEDY}")
        return buffer

    def _open_batch(self, number: int) -> _Batch:
        shard_number, row_number = self._place[number]
        shard = self.manifest.shards[shard_number]
        row = [int(value) for value in shard.batches[row_number]]
        where = f"{self.path / shard.file}: record batch {row_number}"
        message = self._map(shard_number).slice(row[OFFSET], row[BYTES])
        first = not self._verified[number]
        if first and (crc := zlib.crc32(message)) != row[CRC32]:
            raise DataError(f"{where} is corrupt: CRC {crc:#010x}, expected {row[CRC32]:#010x}; {_REMEDY}")
        try:
            batch = self._decode(message, row, first)
        except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{where} is not what the manifest says: {reason}; {_REMEDY}") from None
        self._verified[number] = 1
        return batch

    def _decode(self, data: pa.Buffer, row: list[int], first: bool) -> _Batch:
        """Arrow bytes to arrays. A matching CRC proves they arrived, not that they are harmless."""
        message = pa.ipc.read_message(data)
        if message.type != "record batch":
            raise ValueError(f"a {message.type} message")
        check_declared_size(message, self.manifest, row[DOCUMENTS], row[TOKENS])
        batch = pa.ipc.read_record_batch(message, self._schema)
        if first:
            batch.validate(full=True)
        lists = batch.column("tokens")
        values = lists.values
        if lists.offset or batch.num_rows != row[DOCUMENTS] or len(values) != row[TOKENS]:
            raise ValueError(
                f"{batch.num_rows} documents, {len(values)} tokens, not {row[DOCUMENTS]}, {row[TOKENS]}"
            )
        if values.null_count or any(column.null_count for column in batch.columns):
            raise ValueError("nulls")
        offsets = np.frombuffer(lists.buffers()[1], dtype=np.int32, count=batch.num_rows + 1)
        tokens = values.to_numpy(zero_copy_only=True)
        if first:
            if offsets[0] != 0 or offsets[-1] != tokens.size or (np.diff(offsets) < 1).any():
                raise ValueError("document offsets that do not cover its tokens")
            if int(tokens.max()) >= self.vocab_size:
                raise ValueError(f"token {int(tokens.max())} beyond vocab_size={self.vocab_size}")
        return _Batch(tokens, offsets, batch)


def verify(path: str | Path, progress: Callable[[int, int], None] | None = None) -> Dataset:
    """Check every byte of a dataset: each file's CRC, then every record batch. Returns it opened.

    `progress(done, total)` is called with bytes as the check goes on.

    Raises:  DataError naming the first file or batch that is wrong
    """
    dataset = Dataset(path)
    total, done, number = sum(shard.bytes for shard in dataset.manifest.shards), 0, 0
    for shard in dataset.manifest.shards:
        file, crc = dataset.path / shard.file, 0
        with disk_errors(file, "read"), file.open("rb") as stream:
            while block := stream.read(8 << 20):
                crc = zlib.crc32(block, crc)
                done += len(block)
                if progress is not None:
                    progress(done, total)
        for batch in range(number, number + len(shard.batches)):
            dataset._open_batch(batch)
        number += len(shard.batches)
        if crc != shard.crc32:  # after the batches, whose errors say more
            raise DataError(f"{file} is corrupt: CRC {crc:#010x}, expected {shard.crc32:#010x}; {_REMEDY}")
    return dataset


@contextmanager
def disk_errors(path: Path, action: str = "write") -> Iterator[None]:
    """Turn an operating system's refusal into the one line a user needs."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot {action} {path}: {reason}; check space and permissions") from None
