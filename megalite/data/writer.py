"""Write a dataset folder: streaming, in bounded memory, and either whole or not there."""

from __future__ import annotations

import os
import re
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megalite.data.ipc import shard_schema
from megalite.data.manifest import (
    COMPRESSIONS,
    MANIFEST_FILE,
    MAX_NAME_BYTES,
    Manifest,
    ShardInfo,
    TokenizerInfo,
    dump_manifest,
)
from megalite.data.shards import Document, disk_errors
from megalite.data.tokenizer import Tokenizer
from megalite.errors import DataError

SHARD_BYTES = 256 << 20  # of buffers before compression; keeps int32 list offsets safe
BATCH_TOKENS = 1 << 20  # what one CRC covers and one open verifies: 2 or 4 MiB
COMPRESSED_BATCH_TOKENS = 1 << 17  # smaller, because a shuffled read unpacks a whole batch for a sample
BATCH_DOCUMENTS = 1 << 16
MAX_DOCUMENT_TOKENS = 2**31 - 1

_OUR_FILES = re.compile(
    r"shard_\d{5}\.arrow|manifest\.json|tokenizer(_config)?\.json|stats\.json|(train|valid)(\.tmp)?"
)


class ShardWriter:
    """Write a dataset folder, document by document, in memory bounded by one record batch.

    Everything goes to `<folder>.tmp`; leaving the `with` block without an exception makes it durable
    and renames it to `folder`, leaving it with one removes it. A killed writer's leftovers are
    cleared by the next.

    Raises:  DataError if `folder` is already there, a document does not fit, nothing was written,
             or the disk refuses
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        *,
        compression: str | None = None,
        shard_bytes: int = SHARD_BYTES,
        batch_tokens: int | None = None,
    ) -> None:
        if compression not in COMPRESSIONS:
            raise DataError(f'compression={compression!r} is not known; use "zstd" or none')
        self._folder = Path(folder)
        self._staging = self._folder.with_name(self._folder.name + ".tmp")
        self._tokenizer = tokenizer
        self._compression = compression
        self._shard_bytes = shard_bytes
        self._batch_tokens = batch_tokens or (COMPRESSED_BATCH_TOKENS if compression else BATCH_TOKENS)
        info = TokenizerInfo(tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id)
        self._dtype = Manifest(info, compression, ()).dtype
        self._info = info
        self._pending: list[Document] = []
        self._pending_tokens = 0
        self._shard: _ShardFile | None = None
        self._shards: list[ShardInfo] = []

    def __enter__(self) -> Self:
        if self._folder.exists() and not (self._folder.is_dir() and not any(self._folder.iterdir())):
            raise DataError(f"{self._folder} is already there; choose another folder or remove it first")
        clear_leftovers(self._staging)
        with disk_errors(self._staging):
            self._staging.mkdir(parents=True)
            self._tokenizer.save(self._staging)
        return self

    def write(self, doc_id: str, source: str, tokens: NDArray[np.integer[Any]]) -> None:
        """Append one document: integer tokens [1 ≤ n < 2^31], each in [0, vocab_size), eos included.

        Raises:  DataError naming the document
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not 1 <= tokens.size <= MAX_DOCUMENT_TOKENS:
            raise DataError(
                f"document {doc_id!r}: tokens are {tokens.dtype} {list(tokens.shape)}; expected integers "
                f"[1 … {MAX_DOCUMENT_TOKENS}]"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._info.vocab_size:
            wrong = low if low < 0 else high
            raise DataError(
                f"document {doc_id!r}: token {wrong} at {int(np.argmax(tokens == wrong))} is not in "
                f"[0, {self._info.vocab_size}), the tokenizer's vocabulary"
            )
        if max(len(doc_id.encode()), len(source.encode())) > MAX_NAME_BYTES:
            raise DataError(f"document {doc_id[:40]!r}…: doc_id or source exceeds {MAX_NAME_BYTES} bytes")
        if self._pending_tokens + tokens.size > self._batch_tokens or len(self._pending) >= BATCH_DOCUMENTS:
            self._flush()
        self._pending.append(Document(doc_id, source, tokens.astype(self._dtype)))
        self._pending_tokens += tokens.size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            if self._shard is not None:
                self._shard.abandon()
            shutil.rmtree(self._staging, ignore_errors=True)

    def _flush(self) -> None:
        if not self._pending:
            return
        names, sources, tokens = zip(*self._pending, strict=True)
        offsets = np.zeros(len(tokens) + 1, dtype=np.int32)
        np.cumsum([t.size for t in tokens], out=offsets[1:])
        schema = shard_schema(self._dtype)
        values = pa.array(np.concatenate(tokens))
        lists = pa.ListArray.from_buffers(
            schema.field("tokens").type, len(tokens), [None, pa.py_buffer(offsets)], children=[values]
        )
        batch = pa.record_batch([lists, pa.array(names), pa.array(sources)], schema=schema)
        if self._shard is not None and self._shard.size + batch.nbytes > self._shard_bytes:
            self._close_shard()
        with disk_errors(self._staging):
            if self._shard is None:
                file = self._staging / f"shard_{len(self._shards):05d}.arrow"
                self._shard = _ShardFile(file, schema, self._compression)
            self._shard.write(batch, self._pending_tokens)
        self._pending, self._pending_tokens = [], 0

    def _close_shard(self) -> None:
        if self._shard is not None:
            with disk_errors(self._staging):
                self._shards.append(self._shard.close())
            self._shard = None

    def _commit(self) -> None:
        self._flush()
        self._close_shard()
        if not self._shards:
            raise DataError(f"nothing was written to {self._folder}: no documents; give some text")
        manifest = dump_manifest(Manifest(self._info, self._compression, tuple(self._shards)))
        with disk_errors(self._folder):
            (self._staging / MANIFEST_FILE).write_text(manifest, encoding="utf-8")
            commit_folder(self._staging, self._folder)


class _ShardFile:
    """One Arrow file being written, with the offset and CRC of every record batch."""

    def __init__(self, path: Path, schema: pa.Schema, compression: str | None) -> None:
        self._path = path
        self._file = path.open("xb")
        self._header_bytes = 8 + schema.serialize().size  # magic and padding, then the schema message
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._crc = 0
        self.size = 0
        self._tape = _Tape()
        options = pa.ipc.IpcWriteOptions(compression=compression)
        self._writer = pa.ipc.new_file(self._tape, schema, options=options)

    def write(self, batch: pa.RecordBatch, tokens: int) -> None:
        """Append a record batch."""
        self._writer.write_batch(batch)
        message = self._tape.take()
        if not self._rows:  # Arrow writes the header along with the first batch
            self._append(message[: self._header_bytes])
            message = message[self._header_bytes :]
        self._rows.append((self.size, len(message), zlib.crc32(message), batch.num_rows, tokens))
        self._append(message)

    def close(self) -> ShardInfo:
        """Write the footer and make the file durable."""
        self._writer.close()
        self._append(self._tape.take())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return ShardInfo(self._path.name, self.size, self._crc, np.array(self._rows, dtype=np.int64))

    def abandon(self) -> None:
        """Let go of the file without finishing it."""
        with suppress(OSError):  # closing writes what is buffered, and the disk may be full
            self._file.close()

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self.size += len(data)


class _Tape:
    """What Arrow wrote since the last `take`: a file-like object that only remembers."""

    closed = False

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._position = 0

    def write(self, data: Any) -> int:
        part = bytes(data)
        self._parts.append(part)
        self._position += len(part)
        return len(part)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Nothing to do: the bytes are taken, not flushed."""

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


def clear_leftovers(staging: Path) -> None:
    """Remove what a killed build left in its own staging folder, and nothing else.

    Raises:  DataError if the folder holds a file no build of ours writes
    """
    if not staging.exists():
        return
    for path in staging.rglob("*") if staging.is_dir() else [staging]:
        if not _OUR_FILES.fullmatch(path.name):
            raise DataError(f"{path} is in the way and was not written by megalite; move it elsewhere")
    with disk_errors(staging):
        shutil.rmtree(staging)


def commit_folder(staging: Path, folder: Path) -> None:
    """Make every file of `staging` durable, then let it appear under its name, whole or not at all."""
    for path in staging.iterdir():
        _fsync(path)
    _fsync(staging)
    staging.rename(folder)
    _fsync(folder.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
