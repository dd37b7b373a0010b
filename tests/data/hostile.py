"""Datasets made to do harm, each with CRCs that match; `python -m tests.data.hostile ROOT` opens them.

The process that opens them may take 100 MiB more memory than it has when it begins.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard

from megalite.data.ipc import shard_schema
from megalite.data.manifest import BATCH_COLUMNS
from megalite.data.shards import Dataset
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import DataError

from .datasets import edit_manifest, random_documents, write

MORE_BYTES = 100 << 20
TOKENS = [1, 2, 3, 4]
U16 = shard_schema(np.dtype(np.uint16))
Make = Callable[[Path], object]


def message_of(offsets: list[int], values: list[int]) -> bytes:
    """A record batch message with these bytes as document offsets, whatever they say."""
    rows = len(offsets) - 1
    honest = [*range(rows), len(values)]
    documents = [values[start:stop] for start, stop in itertools.pairwise(honest)]
    lists = pa.array(documents, U16.field("tokens").type)
    ids = pa.array(["x"] * rows)
    data = bytearray(serialized(pa.RecordBatch.from_arrays([lists, ids, ids], schema=U16)))
    body = 8 + int.from_bytes(data[4:8], "little")  # begins with the offsets: there is no validity bitmap
    assert np.frombuffer(data, np.int32, rows + 1, body).tolist() == honest
    data[body : body + 4 * (rows + 1)] = np.array(offsets, dtype=np.int32).tobytes()
    return bytes(data)


def serialized(batch: pa.RecordBatch, codec: str | None = None) -> bytes:
    """A record batch as a message, its schema not included."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    begin = 8 + int.from_bytes(data[4:8], "little")  # after the schema message
    return data[begin:-8]  # before the end of the stream


def with_message(folder: Path, message: bytes, documents: int = 1, tokens: int = 4, **content: Any) -> None:
    """A dataset whose only record batch is `message`, with a CRC that matches."""
    write(folder, random_documents([tokens]), spans=[[]] if content.get("loss_mask") else None)
    (folder / "shard_00000.arrow").write_bytes(message)
    size, crc = len(message), zlib.crc32(message)
    row = {"offset": 0, "bytes": size, "crc32": crc, "documents": documents, "tokens": tokens}
    columns = {key: packed(key, value) for key, value in row.items()}
    shard = {
        "file": "shard_00000.arrow",
        "bytes": size,
        "crc32": crc,
        "arrow_bytes": size,
        "batches": columns,
    }
    edit_manifest(folder, lambda old: old.update({"shards": [shard], "documents": documents, **content}))


def with_batch(
    columns: dict[str, Any], documents: int = 1, tokens: int = 4, codec: str | None = None
) -> Make:
    """One record batch of these Arrow columns."""
    message = serialized(pa.record_batch(columns), codec)
    return lambda folder: with_message(folder, message, documents, tokens, compression=codec)


def with_name_of_length(length: int, codec: str | None = None) -> Make:
    """One record batch whose doc_id of 21 bytes claims another length."""
    columns = [pa.array([TOKENS], U16.field("tokens").type), pa.array(["a" * 21]), pa.array(["x"])]
    message = serialized(pa.record_batch(columns, schema=U16), codec)
    honest, claim = struct.pack("<ii", 0, 21), struct.pack("<ii", 0, length)
    at = message.rindex(honest)  # in the body; metadata before it may look alike
    message = message[:at] + claim + message[at + 8 :]
    return lambda folder: with_message(folder, message, compression=codec)


def with_offsets(offsets: list[int], values: list[int] = TOKENS) -> Make:
    """One record batch of four tokens with these document offsets."""
    message = message_of(offsets, values)
    return lambda folder: with_message(folder, message, len(offsets) - 1, 4)


def with_spans(*documents: list[int]) -> Make:
    """One document of four tokens in each row, with these loss mask bounds."""
    schema = shard_schema(np.dtype(np.uint16), has_loss_mask=True)
    names = ["x"] * len(documents)
    columns = [
        pa.array([TOKENS] * len(documents), schema.field("tokens").type),
        pa.array(names),
        pa.array(names),
    ]
    batch = pa.record_batch([*columns, pa.array(documents, schema.field("loss_mask").type)], schema=schema)
    message, tokens = serialized(batch), 4 * len(documents)
    return lambda folder: with_message(folder, message, len(documents), tokens, loss_mask=True)


def with_declared(codec: str, claim: int) -> Make:
    """A compressed record batch whose token buffer claims to unpack to `claim` bytes."""

    def make(folder: Path) -> None:
        lists = pa.array([[7] * 50_000], U16.field("tokens").type)
        batch = pa.record_batch([lists, pa.array(["x"]), pa.array(["x"])], schema=U16)
        data = bytearray(serialized(batch, codec))
        at = data.index((100_000).to_bytes(8, "little"))
        data[at : at + 8] = claim.to_bytes(8, "little", signed=True)
        with_message(folder, bytes(data), 1, 50_000, compression=codec)

    return make


def bomb_in_a_batch(codec: str) -> Make:
    """A few kilobytes that truly unpack to 256 MiB, where the manifest speaks of four tokens."""

    def make(folder: Path) -> None:
        lists = pa.ListArray.from_arrays([0, 1 << 27], pa.array(np.zeros(1 << 27, dtype=np.uint16)))
        batch = pa.record_batch(
            [lists.cast(U16.field("tokens").type), pa.array(["x"]), pa.array(["x"])], schema=U16
        )
        with_message(folder, serialized(batch, codec), compression=codec)

    return make


def with_zstd(pack: Callable[[bytes], bytes], arrow_bytes: int | None = None) -> Make:
    """A shard compressed whole by `pack`."""

    def make(folder: Path) -> None:
        write(folder, random_documents([50]), compression="zstd-shard")
        path = folder / "shard_00000.arrow.zst"
        data = pack(zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes()))
        path.write_bytes(data)

        def change(content: Any) -> None:
            shard = content["shards"][0]
            shard.update(bytes=len(data), crc32=zlib.crc32(data))
            shard["arrow_bytes"] = arrow_bytes or shard["arrow_bytes"]

        edit_manifest(folder, change)

    return make


def zeros_packed(data: bytes) -> bytes:
    """One GiB of zeros in a frame of some 30 kB."""
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(1024)) + packer.flush()


def wide_window(data: bytes) -> bytes:
    """A frame that says it needs a window of 2 GiB to be read."""
    head = struct.pack("<IBB", 0xFD2FB528, 0, (31 - 10) << 3)  # magic, no content size, window 2^31
    return head + struct.pack("<I", 1 | len(data) << 3)[:3] + data  # one last block, stored as it is


def with_manifest(change: Callable[[Any], object]) -> Make:
    """An honest dataset with another manifest."""

    def make(folder: Path) -> None:
        write(folder, random_documents([50]))
        edit_manifest(folder, change)

    return make


def with_text(text: bytes, name: str = "manifest.json") -> Make:
    """An honest dataset with other bytes as one of its files."""

    def make(folder: Path) -> None:
        write(folder, random_documents([50]))
        (folder / name).write_bytes(text)

    return make


def with_link(name: str, target: str) -> Make:
    """An honest dataset with a link in place of a file."""

    def make(folder: Path) -> None:
        write(folder, random_documents([50]))
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return make


def packed(key: str, *values: int) -> str:
    """A column of a manifest's `batches`."""
    return base64.b64encode(np.array(values, dtype=BATCH_COLUMNS[key]).tobytes()).decode()


def batches(**columns: Any) -> Make:
    """An honest dataset with other columns of batches: lists of numbers, or what stands in the file."""
    written = {key: packed(key, *v) if type(v) is list else v for key, v in columns.items()}
    return with_manifest(lambda content: content["shards"][0]["batches"].update(written))


def with_pipe(folder: Path) -> None:
    """A pipe nobody writes to in place of a shard."""
    write(folder, random_documents([50]))
    (folder / "shard_00000.arrow").unlink()
    os.mkfifo(folder / "shard_00000.arrow")


LIST_U16 = U16.field("tokens").type
X = pa.array(["x"])
NOT_UTF8 = {
    "tokens": pa.array([TOKENS], LIST_U16),
    "doc_id": pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")]
    ),
    "source": X,
}
CASES: dict[str, Make] = {
    "offsets beyond the tokens": with_offsets([0, 2**31 - 1]),
    "offsets negative at the end": with_offsets([0, -5]),
    "offsets negative at the start": with_offsets([-3, 4]),
    "offsets falling": with_offsets([0, 3, 1]),
    "offsets leaving tokens out": with_offsets([0, 2]),
    "offsets starting late": with_offsets([1, 4]),
    "an empty document": with_offsets([0, 2, 2, 4]),
    "a token beyond the vocabulary": with_offsets([0, 4], [1, 2, 3, 257]),
    "fewer tokens than counted": with_offsets([0, 3], [1, 2, 3]),
    "no rows": with_batch({"tokens": pa.array([], LIST_U16), "doc_id": X[:0], "source": X[:0]}),
    "no tokens": with_batch({"tokens": pa.array([[]], LIST_U16), "doc_id": X, "source": X}),
    "lists of lists": with_batch({"tokens": pa.array([[[1, 2], [3, 4]]]), "doc_id": X, "source": X}),
    "tokens as text": with_batch({"tokens": pa.array(["1234"]), "doc_id": X, "source": X}),
    "tokens as int64": with_batch({"tokens": pa.array([TOKENS]), "doc_id": X, "source": X}),
    "tokens as a struct": with_batch({"tokens": pa.array([{"a": TOKENS}]), "doc_id": X, "source": X}),
    "null tokens": with_batch({"tokens": pa.array([[1, None, 3, 4]], LIST_U16), "doc_id": X, "source": X}),
    "a null document": with_batch({"tokens": pa.array([None], LIST_U16), "doc_id": X, "source": X}),
    "a null name": with_batch(
        {"tokens": pa.array([TOKENS], LIST_U16), "doc_id": pa.array([None], pa.string()), "source": X}
    ),
    "a null name, compressed": with_batch(
        {"tokens": pa.array([TOKENS], LIST_U16), "doc_id": pa.array([None], pa.string()), "source": X},
        codec="zstd",
    ),
    "a name that is not UTF-8": with_batch(NOT_UTF8),
    "a name that is not UTF-8, compressed": with_batch(NOT_UTF8, codec="zstd"),
    "a name beyond its buffer": with_name_of_length(2**30),
    "a name beyond its buffer, compressed": with_name_of_length(2**30, "lz4"),
    "a name of negative length": with_name_of_length(-1),
    "a name of negative length, compressed": with_name_of_length(-1, "lz4"),
    "a column missing": with_batch({"tokens": pa.array([TOKENS], LIST_U16)}),
    "dictionary-encoded names": with_batch(
        {"tokens": pa.array([TOKENS], LIST_U16), "doc_id": X.dictionary_encode(), "source": X}
    ),
    "a schema message": lambda folder: with_message(folder, U16.serialize().to_pybytes()),
    "no message": lambda folder: with_message(folder, bytes(64)),
    "a message of huge length": lambda folder: with_message(folder, struct.pack("<II", 2**32 - 1, 2**31 - 8)),
    "a message of negative length": lambda folder: with_message(folder, struct.pack("<Ii", 2**32 - 1, -8)),
    "noise": lambda folder: with_message(folder, np.random.default_rng(0).bytes(4096)),
    "spans beyond the document": with_spans([0, 5]),
    "spans of odd length": with_spans([0, 1, 2], [1]),
    "spans falling": with_spans([2, 3, 0, 1]),
    "spans that are empty": with_spans([2, 2]),
    "spans of 2^32 − 1": with_spans([1, 2**32 - 1]),
    "zstd claiming 2^60 bytes": with_declared("zstd", 2**60),
    "zstd claiming 1 GiB": with_declared("zstd", 2**30),
    "zstd claiming too little": with_declared("zstd", 99_998),
    "zstd claiming a negative size": with_declared("zstd", -5),
    "lz4 claiming 2^60 bytes": with_declared("lz4", 2**60),
    "lz4 claiming too little": with_declared("lz4", 8),
    "a zstd bomb in a batch": bomb_in_a_batch("zstd"),
    "an lz4 bomb in a batch": bomb_in_a_batch("lz4"),
    "a zstd bomb as a shard": with_zstd(zeros_packed),
    "a zstd shard of 2^52 bytes": with_zstd(zeros_packed, 2**52),
    "a zstd shard with a window of 2 GiB": with_zstd(wide_window),
    "a zstd shard that is cut": with_zstd(lambda data: zstandard.compress(data)[:-20]),
    "a zstd shard that is noise": with_zstd(lambda data: data),
    "a zstd shard that is empty": with_zstd(lambda data: zstandard.compress(b"")),
    "a path upwards": with_manifest(lambda c: c["shards"][0].update(file="../shard_00000.arrow")),
    "an absolute path": with_manifest(lambda c: c["shards"][0].update(file="/etc/passwd")),
    "a link out of the folder": with_link("shard_00000.arrow", "/etc/passwd"),
    "a link inside the folder": with_link("shard_00000.arrow", "manifest.json"),
    "a link to itself": with_link("shard_00000.arrow", "shard_00000.arrow"),
    "a manifest that is a link": with_link("manifest.json", "/dev/zero"),
    "a tokenizer that is a link": with_link("tokenizer.json", "/dev/zero"),
    "a pipe": with_pipe,
    "2^32 − 1 tokens": batches(tokens=[2**32 - 1]),
    "2^31 − 1 tokens": batches(tokens=[2**31 - 1]),
    "an offset of 2^64 − 8": batches(offset=[2**64 - 8]),
    "2^63 bytes": batches(bytes=[2**63]),
    "a number for a column": batches(tokens=10**400),
    "a column of numbers": batches(tokens=(50,)),
    "a column that is not base64": batches(tokens="50, 51"),
    "a column cut off": batches(offset="AAAAAAAA"),
    "no batches": batches(offset=[], bytes=[], crc32=[], documents=[], tokens=[]),
    "a vocabulary of 2^60": with_manifest(lambda c: c["tokenizer"].update(vocab_size=2**60)),
    "deep JSON": with_text(b'{"a":' * 200_000),
    "JSON of 99 MiB": with_text(b"[" + b"0," * (99 << 19) + b"0]"),
    "a number of a million digits": with_text(b"9" * 1_000_000),
    "a manifest of zeros": with_text(bytes(1 << 20)),
    "a deep tokenizer": with_text(b"[" * 200_000, "tokenizer.json"),
}


HONEST = ("honest", "honest-zstd", "honest-zstd-shard")


def build(root: Path) -> list[str]:
    """Make every case in a folder of its own, named by its number, and an honest dataset; their names."""
    for number, make in enumerate(CASES.values()):
        make(root / f"{number:03d}")
    write(root / "honest", random_documents([1 << 20, 50]))
    write(root / "honest-zstd", random_documents([1 << 20, 50]), compression="zstd")
    write(root / "honest-zstd-shard", random_documents([1 << 20, 50]), compression="zstd-shard")
    return [*CASES, *HONEST]


def open_all(root: Path) -> None:
    """Open each folder, print what came of it, with the seconds it took, a line of JSON each."""
    pa.allocate_buffer(1 << 20)  # Arrow reserves addresses when it first needs memory
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MORE_BYTES, size + MORE_BYTES))
    for folder in sorted(root.iterdir()):
        began = time.perf_counter()
        try:
            dataset = Dataset(folder)
            load_tokenizer(folder)
            outcome = f"read {sum(len(document.tokens) for document in dataset.documents())} tokens"
        except DataError:
            outcome = "refused"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        print(json.dumps([outcome, time.perf_counter() - began]), flush=True)


if __name__ == "__main__":
    open_all(Path(sys.argv[1]))
