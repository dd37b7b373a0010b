"""The Arrow schema of a shard, and the one check Arrow leaves to us: sizes before allocation."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pyarrow as pa

from megalite.data.manifest import MAX_NAME_BYTES, Manifest


def shard_schema(dtype: np.dtype[Any]) -> pa.Schema:
    """One row a document: `tokens: list<uint16 | uint32>`, `doc_id: string`, `source: string`."""
    token = pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)
    return pa.schema(
        [
            pa.field("tokens", pa.list_(token), nullable=False),
            pa.field("doc_id", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
        ]
    )


def check_declared_size(message: pa.Message, manifest: Manifest, documents: int, tokens: int) -> None:
    """Refuse a record batch whose compressed buffers claim to unpack to more than its rows can fill.

    Arrow allocates what each buffer's first eight bytes say, so a few hostile bytes could ask for
    all memory. `message` has passed Arrow's flatbuffer verification, so its tables may be walked.

    Raises:  ValueError
    """
    meta = memoryview(message.metadata)
    table = _follow(meta, _field(meta, _follow(meta, 0), 2))  # Message.header, a RecordBatch
    if not _field(meta, table, 3):  # RecordBatch.compression: nothing will be unpacked
        return
    if manifest.compression is None:
        raise ValueError("compressed, though the dataset is not")
    body = memoryview(message.body)
    vector = _follow(meta, _field(meta, table, 2))  # RecordBatch.buffers: structs of offset, length
    (count,) = struct.unpack_from("<I", meta, vector)
    declared = 0
    for n in range(count):
        offset, length = struct.unpack_from("<qq", meta, vector + 4 + 16 * n)
        if length >= 8:
            if not 0 <= offset <= len(body) - 8:
                raise ValueError("a buffer outside its message")
            # −1 says "stored as it is"; Arrow then takes no more than `length`.
            declared += max(struct.unpack_from("<q", body, offset)[0], 0)
    limit = tokens * manifest.dtype.itemsize + documents * (2 * MAX_NAME_BYTES + 16) + 4096
    if declared > limit:
        raise ValueError(f"{declared} bytes after decompression, at most {limit} expected")


def _follow(data: memoryview, position: int) -> int:
    """Where a flatbuffer reference at `position` points."""
    return position + int(struct.unpack_from("<I", data, position)[0])


def _field(data: memoryview, table: int, slot: int) -> int:
    """Position of a flatbuffer table's field, 0 if it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    (size,) = struct.unpack_from("<H", data, vtable)
    entry = 4 + 2 * slot
    offset = struct.unpack_from("<H", data, vtable + entry)[0] if entry < size else 0
    return table + int(offset) if offset else 0
