"""One shard being written: Arrow's bytes counted, checksummed and perhaps compressed on their way to disk."""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard

from megalite.data.manifest import ShardInfo

# Tokens of source code come out an eighth smaller than by Arrow's own level 1, and are read as fast. Its
# window of 2 MiB is far below what readers accept.
ZSTD_LEVEL = 6


class ShardFile:
    """A new file at `path`, which must not exist; `compression` as in the manifest."""

    def __init__(self, path: Path, schema: pa.Schema, compression: str | None) -> None:
        self._path = path
        self._file = path.open("xb")
        self._packer: Any = None
        if compression == "zstd-shard":
            compression = None
            self._packer = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj()
        self._header_bytes = 8 + schema.serialize().size  # magic and padding, then the schema message
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._stored_bytes = 0
        self._crc = 0
        self.arrow_bytes = 0
        self._tape = _Tape()
        codec = pa.Codec("zstd", compression_level=ZSTD_LEVEL) if compression == "zstd" else compression
        options = pa.ipc.IpcWriteOptions(compression=codec)
        self._writer = pa.ipc.new_file(self._tape, schema, options=options)

    def write(self, batch: pa.RecordBatch, tokens: int) -> None:
        """Append a record batch."""
        self._writer.write_batch(batch)
        message = self._tape.take()
        if not self._rows:  # Arrow writes the header along with the first batch
            self._append(message[: self._header_bytes])
            message = message[self._header_bytes :]
        self._rows.append((self.arrow_bytes, len(message), zlib.crc32(message), batch.num_rows, tokens))
        self._append(message)

    def close(self) -> ShardInfo:
        """Write the footer and make the file durable."""
        self._writer.close()
        self._append(self._tape.take())
        if self._packer is not None:
            self._store(self._packer.flush())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        batches = np.array(self._rows, dtype=np.int64)
        return ShardInfo(self._path.name, self._stored_bytes, self._crc, self.arrow_bytes, batches)

    def abandon(self) -> None:
        """Let go of the file without finishing it."""
        with suppress(OSError):  # closing writes what is buffered, and the disk may be full
            self._file.close()

    def _append(self, data: bytes) -> None:
        self.arrow_bytes += len(data)
        self._store(data if self._packer is None else self._packer.compress(data))

    def _store(self, data: bytes) -> None:
        self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self._stored_bytes += len(data)


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
