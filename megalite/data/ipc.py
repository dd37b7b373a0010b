"""A shard's Arrow schema, and record batches taken apart without trusting them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megalite.data.manifest import MAX_NAME_BYTES, Manifest

# What Arrow, numpy and our own checks raise over a batch that is not what it should be.
REFUSALS = (pa.ArrowException, OSError, EOFError, ValueError, MemoryError, OverflowError)


class Parts(NamedTuple):
    """A record batch as arrays, see `megalite.data.shards.Block`; `names` gives its columns `doc_id` and
    `source`, or raises one of REFUSALS."""

    tokens: NDArray[Any]
    offsets: NDArray[np.int32]
    loss_mask: NDArray[np.bool_] | None
    names: Callable[[], pa.RecordBatch]


def shard_schema(dtype: np.dtype[Any], has_loss_mask: bool = False) -> pa.Schema:
    """One row a document: `tokens: list<uint16 | uint32>`, `doc_id`, `source`, perhaps `loss_mask`.

    `loss_mask: list<uint32>` holds start, stop, start, stop … of the tokens that count for the loss,
    ascending, counted from the document's beginning.
    """
    token = pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)
    fields = [
        pa.field("tokens", pa.list_(token), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
    if has_loss_mask:
        bound = pa.field("item", pa.uint32(), nullable=False)
        fields.append(pa.field("loss_mask", pa.list_(bound), nullable=False))
    return pa.schema(fields)


def decode(
    data: pa.Buffer, schema: pa.Schema, manifest: Manifest, documents: int, tokens: int, is_checked: bool
) -> Parts:
    """Check a record batch message and take it apart, without a copy where it is not compressed.

    A matching CRC proves that its bytes arrived, not that they are harmless. `is_checked` says that
    the same bytes have passed before, which saves what looks at every token. Compressed names are unpacked
    when they are asked for, and checked then: training never asks, and it would wait for them a fifth longer.

    Raises:  one of REFUSALS
    """
    message = pa.ipc.read_message(data)
    if message.type != "record batch":
        raise ValueError(f"a {message.type} message")
    check_declared_size(message, manifest, documents, tokens)
    names: Callable[[], pa.RecordBatch]
    if manifest.compression in ("lz4", "zstd"):
        batch = _unpacked(data, schema, "tokens", "loss_mask")
        names = partial(_names, data, schema, documents)
    else:
        batch = pa.ipc.read_record_batch(message, schema)
        names = partial(batch.select, ["doc_id", "source"])
    _check(batch, documents, is_checked)
    values, offsets = _lists(batch.column("tokens"), manifest.dtype)
    if values.size != tokens:
        raise ValueError(f"{values.size} tokens, not {tokens}")
    if (offsets[1:] <= offsets[:-1]).any():
        raise ValueError("documents without tokens")
    if not is_checked and (largest := int(values.max())) >= manifest.tokenizer.vocab_size:
        raise ValueError(f"token {largest} beyond vocab_size={manifest.tokenizer.vocab_size}")
    mask = None
    if manifest.has_loss_mask:
        mask = _loss_mask(offsets, *_lists(batch.column("loss_mask"), np.dtype(np.uint32)))
    return Parts(values, offsets, mask, names)


def _unpacked(data: pa.Buffer, schema: pa.Schema, *columns: str) -> pa.RecordBatch:
    """Some columns of a compressed record batch message, which begins with its schema for this: only so can
    Arrow be told to leave columns out, and to unpack in this thread. Its pool of them takes longer to hand
    out such small buffers than it saves."""
    included = [n for n, name in enumerate(schema.names) if name in columns]
    options = pa.ipc.IpcReadOptions(included_fields=included, use_threads=False)
    return pa.ipc.open_stream(b"".join((schema.serialize(), data)), options=options).read_next_batch()


def _names(data: pa.Buffer, schema: pa.Schema, documents: int) -> pa.RecordBatch:
    batch = _unpacked(data, schema, "doc_id", "source")
    _check(batch, documents, is_checked=False)
    return batch


def _check(batch: pa.RecordBatch, documents: int, is_checked: bool) -> None:
    """What holds for all columns.

    Raises:  one of REFUSALS
    """
    if not is_checked:
        batch.validate(full=True)
    if any(column.null_count for column in batch.columns):
        raise ValueError("nulls")
    if batch.num_rows != documents:
        raise ValueError(f"{batch.num_rows} documents, not {documents}")


def _lists(column: pa.ListArray, dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Values of a list column and the places where its rows begin and the last ends.

    From the buffers, since Arrow's own `to_numpy` imports pandas where it is installed: a quarter of a
    second and 30 MiB.
    """
    values = column.values
    if column.offset or values.offset or values.null_count:
        raise ValueError("nulls or slices")
    offsets = np.frombuffer(column.buffers()[1], dtype=np.int32, count=len(column) + 1)
    if offsets[0] != 0 or offsets[-1] != len(values) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError("offsets that do not cover the values")
    buffer = values.buffers()[1]  # None where there are no values
    size = buffer.size if buffer is not None else 0
    if size != len(values) * dtype.itemsize:  # it holds another type
        raise ValueError(f"{len(values)} values of {dtype} in {size} bytes")
    if buffer is None:
        return np.empty(0, dtype=dtype), offsets
    return np.frombuffer(buffer, dtype=dtype), offsets


def _loss_mask(
    offsets: NDArray[np.int32], bounds: NDArray[np.uint32], rows: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Bool [tokens] from spans: document d has the bounds start, stop, … from rows[d] to rows[d + 1]."""
    counts = np.diff(rows)
    begins, ends = (np.repeat(edge, counts).astype(np.int64) for edge in (offsets[:-1], offsets[1:]))
    places = begins + bounds
    starts, stops = places[::2], places[1::2]
    ascending = (places[1:] >= places[:-1]).all()
    if (counts % 2).any() or (places > ends).any() or not ascending or (starts >= stops).any():
        raise ValueError("loss_mask spans that are not ascending pairs inside their document")
    runs = np.diff(places, prepend=0, append=int(offsets[-1]))
    mask = np.repeat(np.arange(runs.size) % 2 == 1, runs)
    mask.setflags(write=False)
    return mask


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
    if manifest.compression not in ("lz4", "zstd"):
        raise ValueError("compressed, though the dataset's record batches are not")
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
    spans = 8 * tokens + 4 * documents if manifest.has_loss_mask else 0
    limit = tokens * manifest.dtype.itemsize + documents * (2 * MAX_NAME_BYTES + 16) + spans + 4096
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
