"""`manifest.json`: what a dataset folder holds, readable without touching a shard.

The manifest is untrusted input. Everything in it is checked before anything is opened or
allocated, and it ends with a CRC of all bytes before, so a flipped digit in a count cannot pass.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from megalite.data.folder import Folder
from megalite.errors import DataError

FORMAT = "megalite-shards"
VERSION = 3
MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 256 << 20
MAX_NAME_BYTES = 4096  # of a doc_id or source
# lz4 and zstd compress the buffers of each record batch, zstd-shard whole files.
COMPRESSIONS = (None, "lz4", "zstd", "zstd-shard")

# Columns of ShardInfo.batches. In the file each is a base64 string of little-endian integers, one per record
# batch: there may be millions, and as JSON numbers they take seven times as long to read.
BATCH_COLUMNS = {"offset": "<u8", "bytes": "<u8", "crc32": "<u4", "documents": "<u4", "tokens": "<u4"}
OFFSET, BYTES, CRC32, DOCUMENTS, TOKENS = range(5)

# A plain name and nothing else: no separators, no "..", no hidden files, no drive letters.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
_SEAL = re.compile(rb',\n  "crc32": (\d{1,10})\n}\n')
_SEAL_BYTES: Final = 40  # at least as long as the longest match

T = TypeVar("T", int, str, bool, dict[str, Any], list[Any])


@dataclass(frozen=True)
class TokenizerInfo:
    """What the shards remember of their tokenizer. The fingerprint covers its content and eos_id."""

    kind: str
    fingerprint: str
    vocab_size: int
    eos_id: int


@dataclass(frozen=True)
class ShardInfo:
    """One shard: its file as stored, and the record batches of the Arrow file in it.

    `batches` is int64 [record batches, 5], columns as in BATCH_COLUMNS; offsets count in the Arrow
    file, which has `arrow_bytes` bytes and is the stored file itself unless that is compressed whole.
    """

    file: str
    bytes: int
    crc32: int
    arrow_bytes: int
    batches: NDArray[np.int64]


@dataclass(frozen=True)
class Manifest:
    """A whole dataset: its tokenizer and its shards in stored order.

    `has_loss_mask` says whether documents carry spans of tokens that count for the loss;
    `empty_documents` counts documents without a token, which were left out; `file_crc32` is the CRC of the
    file it was read from, as a whole.
    """

    tokenizer: TokenizerInfo
    compression: str | None
    shards: tuple[ShardInfo, ...]
    has_loss_mask: bool = False
    empty_documents: int = 0
    file_crc32: int | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a stored token: the smallest unsigned integer that holds every id."""
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32)

    @cached_property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(int(shard.batches[:, DOCUMENTS].sum()) for shard in self.shards)

    @cached_property
    def tokens(self) -> int:
        """Tokens in all shards, end-of-document tokens included."""
        return sum(int(shard.batches[:, TOKENS].sum()) for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """Of `manifest.json`, CRCs of the data included: equal only for the same dataset."""
        # Writing a large one again would take longer than reading it has.
        crc = zlib.crc32(dump_manifest(self)) if self.file_crc32 is None else self.file_crc32
        return f"{crc:08x}"


def dump_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON text, one shard a line, sealed with the CRC of everything before."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": manifest.dtype.name,
        "compression": manifest.compression,
        "loss_mask": manifest.has_loss_mask,
        "tokenizer": asdict(manifest.tokenizer),
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "empty_documents": manifest.empty_documents,
    }
    shards = ",\n".join(f"    {json.dumps(shard_to_json(shard))}" for shard in manifest.shards)
    text = json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "shards": [\n{shards}\n  ]'
    return seal(text.encode())


def seal(text: bytes) -> bytes:
    """A JSON object without its closing brace, completed by the CRC of all its bytes."""
    return text + f',\n  "crc32": {zlib.crc32(text)}\n}}\n'.encode()


def load_manifest(folder: Folder) -> Manifest:
    """Read and check a folder's `manifest.json`.

    Raises:  DataError naming the file and key, the value seen and what would be right
    """
    path = folder.locate(MANIFEST_FILE)
    data = folder.read(MANIFEST_FILE, MAX_MANIFEST_BYTES)
    content = _parse(path, data)
    if content.get("format") != FORMAT:
        raise DataError(f'{path}: format is {_show(content.get("format"))}; expected "{FORMAT}"')
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        raise DataError(
            f"{path}: version is {_show(version)}; this megalite reads version {VERSION}: build it again"
        )
    file_crc32 = _check_seal(path, data)
    compression = content.get("compression")
    if compression is not None and compression not in COMPRESSIONS:
        raise DataError(
            f'{path}: compression is {_show(compression)}; expected null, "lz4", "zstd" or "zstd-shard"'
        )
    shards = tuple(
        shard_from_json(path, shard, compression, f"shards[{n}]")
        for n, shard in enumerate(_field(path, content, "shards", list))
    )
    manifest = Manifest(
        _tokenizer_from_json(path, content),
        compression,
        shards,
        _field(path, content, "loss_mask", bool),
        _field(path, content, "empty_documents", int),
        file_crc32,
    )
    derived = {"dtype": manifest.dtype.name, "documents": manifest.documents, "tokens": manifest.tokens}
    for key, expected in derived.items():
        if type(content.get(key)) is not type(expected) or content[key] != expected:
            raise DataError(f"{path}: {key} is {_show(content.get(key))} but its parts make {expected}")
    if not manifest.tokens:
        raise DataError(f"{path}: the dataset holds no tokens; build it again from text")
    if len({shard.file for shard in shards}) != len(shards):
        raise DataError(f"{path}: a shard file is listed twice; every shard has its own file")
    return manifest


def _parse(path: str, data: bytes) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        content = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or "it does not fit into memory"
        raise DataError(f"{path} is not valid JSON: {reason}; restore it or rebuild the dataset") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {_show(content)}")
    return content


def _check_seal(path: str, data: bytes) -> int:
    """Compare the content with the CRC at its end; that of the file as a whole."""
    found = _SEAL.search(data, max(0, len(data) - _SEAL_BYTES))
    if found is None or found.end() != len(data):
        raise DataError(f'{path} does not end with its "crc32"; restore it or rebuild the dataset')
    crc, stored = zlib.crc32(memoryview(data)[: found.start()]), int(found[1])
    if crc != stored:
        raise DataError(
            f"{path}: content has CRC {crc:#010x} but the file says {stored:#010x}; it was changed after "
            "it was written: restore it or rebuild the dataset"
        )
    return zlib.crc32(found[0], crc)


def shard_to_json(shard: ShardInfo) -> dict[str, Any]:
    """A shard's entry in the manifest."""
    columns = {
        name: base64.b64encode(shard.batches[:, n].astype(dtype).tobytes()).decode()
        for n, (name, dtype) in enumerate(BATCH_COLUMNS.items())
    }
    sizes = {"bytes": shard.bytes, "crc32": shard.crc32, "arrow_bytes": shard.arrow_bytes}
    return {"file": shard.file, **sizes, "batches": columns}


def shard_from_json(path: str, shard: Any, compression: str | None, where: str) -> ShardInfo:
    """Read a shard's entry back; `path` and `where` name it in errors.

    Raises:  DataError naming the key, the value seen and what would be right
    """
    if not isinstance(shard, dict):
        raise DataError(f"{path}: {where} is {_show(shard)}; expected an object")
    file = _field(path, shard, "file", str, where)
    if not _FILE_NAME.fullmatch(file):
        raise DataError(f"{path}: {where}.file is {_show(file)}; expected a plain file name")
    size, crc, arrow = (_field(path, shard, key, int, where) for key in ("bytes", "crc32", "arrow_bytes"))
    if compression != "zstd-shard" and arrow != size:
        raise DataError(f"{path}: {where} has bytes={size} but arrow_bytes={arrow}; it is not compressed")
    table = _field(path, shard, "batches", dict, where)
    columns = [_column(path, table, key, f"{where}.batches") for key in BATCH_COLUMNS]
    if len({len(column) for column in columns}) != 1 or not len(columns[0]):
        raise DataError(f"{path}: {where}.batches has columns of lengths {[len(c) for c in columns]}")
    batches = np.array(columns, dtype=np.int64).T
    ends = batches[:, OFFSET] + batches[:, BYTES]
    if ends[-1] > arrow or (batches[1:, OFFSET] < ends[:-1]).any() or (batches[:, BYTES] < 1).any():
        raise DataError(f"{path}: {where}.batches are empty, overlap or leave the file's {arrow} bytes")
    documents, tokens = batches[:, DOCUMENTS], batches[:, TOKENS]
    if (documents < 1).any() or (documents > tokens).any() or (tokens >= 2**31).any():
        raise DataError(f"{path}: {where}.batches counts are out of range; 1 ≤ documents ≤ tokens < 2^31")
    return ShardInfo(file, size, crc, arrow, batches)


def _column(path: str, table: Mapping[str, Any], key: str, where: str) -> NDArray[Any]:
    """A column of `batches`, its values below 2^53."""
    text, dtype = _field(path, table, key, str, where), np.dtype(BATCH_COLUMNS[key])
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), dtype)
    except (binascii.Error, ValueError):
        raise DataError(
            f"{path}: {where}.{key} is {_show(text)}; expected base64 of {dtype.itemsize}-byte integers"
        ) from None
    if values.max(initial=0) >= 2**53:
        raise DataError(f"{path}: {where}.{key} holds {values.max()}; expected integers in [0, 2^53)")
    return values


def _tokenizer_from_json(path: str, content: Mapping[str, Any]) -> TokenizerInfo:
    table = _field(path, content, "tokenizer", dict)
    kind, fingerprint = (_field(path, table, key, str, "tokenizer") for key in ("kind", "fingerprint"))
    vocab_size, eos_id = (_field(path, table, key, int, "tokenizer") for key in ("vocab_size", "eos_id"))
    if not eos_id < vocab_size <= 1 << 32:
        raise DataError(f"{path}: tokenizer.eos_id={eos_id} is not below vocab_size={vocab_size} ≤ 2^32")
    return TokenizerInfo(kind, fingerprint, vocab_size, eos_id)


_EXPECTED = {
    int: "an integer in [0, 2^53)",
    str: "a string",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def _field(path: str, table: Mapping[str, Any], key: str, kind: type[T], where: str = "") -> T:
    name = f"{where}.{key}" if where else key
    if key not in table:
        raise DataError(f"{path}: key {name} is missing; restore the file or rebuild the dataset")
    value = table[key]
    if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**53):
        raise DataError(f"{path}: {name} is {_show(value)}; expected {_EXPECTED[kind]}")
    return value


def _show(value: Any) -> str:
    """A value from an untrusted file, short enough for one line."""
    if isinstance(value, list | dict) and value:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = json.dumps(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:60]}…"
