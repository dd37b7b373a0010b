"""`manifest.json`: what a dataset folder holds, readable without touching a shard.

The manifest is untrusted input. Everything in it is checked before anything is opened or
allocated, and it carries a CRC of its own content, so a flipped digit in a count cannot pass.
"""

from __future__ import annotations

import json
import re
import stat
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from megalite.errors import DataError

FORMAT = "megalite-shards"
VERSION = 1
MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 256 << 20
MAX_NAME_BYTES = 4096  # of a doc_id or source
COMPRESSIONS = (None, "zstd")

# Columns of ShardInfo.batches. In the file each is a list, one entry per record batch.
BATCH_COLUMNS = ("offset", "bytes", "crc32", "documents", "tokens")
OFFSET, BYTES, CRC32, DOCUMENTS, TOKENS = range(5)

T = TypeVar("T", int, str, dict[str, Any], list[Any])


@dataclass(frozen=True)
class TokenizerInfo:
    """What the shards remember of their tokenizer. The fingerprint covers its content and eos_id."""

    kind: str
    fingerprint: str
    vocab_size: int
    eos_id: int


@dataclass(frozen=True)
class ShardInfo:
    """One Arrow file. `batches` is int64 [record batches, 5], columns as in BATCH_COLUMNS."""

    file: str
    bytes: int
    crc32: int
    batches: NDArray[np.int64]


@dataclass(frozen=True)
class Manifest:
    """A whole dataset: its tokenizer and its shards in stored order."""

    tokenizer: TokenizerInfo
    compression: str | None
    shards: tuple[ShardInfo, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a stored token: the smallest unsigned integer that holds every id."""
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32)

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(int(shard.batches[:, DOCUMENTS].sum()) for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens in all shards, end-of-document tokens included."""
        return sum(int(shard.batches[:, TOKENS].sum()) for shard in self.shards)

    @property
    def digest(self) -> str:
        """Of all that the manifest says, CRCs of the data included: equal only for the same dataset."""
        return f"{zlib.crc32(dump_manifest(self).encode()):08x}"


def dump_manifest(manifest: Manifest) -> str:
    """The manifest as JSON text, one shard a line, with the CRC of its content."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": manifest.dtype.name,
        "compression": manifest.compression,
        "tokenizer": asdict(manifest.tokenizer),
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "shards": [_shard_to_json(shard) for shard in manifest.shards],
    }
    shards = ",\n".join(f"    {json.dumps(shard)}" for shard in content["shards"])  # type: ignore[attr-defined]
    head = {key: value for key, value in content.items() if key != "shards"} | {"crc32": _crc(content)}
    return json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "shards": [\n{shards}\n  ]\n}}\n'


def load_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`.

    Raises:  DataError naming the file and key, the value seen and what would be right
    """
    path = folder / MANIFEST_FILE
    content = _read_json(path)
    if content.get("format") != FORMAT:
        raise DataError(f'{path}: format is {_show(content.get("format"))}; expected "{FORMAT}"')
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        raise DataError(f"{path}: version is {_show(version)}; this megalite reads version {VERSION}")
    stored_crc = _field(path, content, "crc32", int)
    if (crc := _crc({key: value for key, value in content.items() if key != "crc32"})) != stored_crc:
        raise DataError(
            f"{path}: content has CRC {crc:#010x} but the file says {stored_crc:#010x}; it was changed after "
            "it was written: restore it or rebuild the dataset"
        )
    compression = content.get("compression")
    if compression not in COMPRESSIONS:
        raise DataError(f'{path}: compression is {_show(compression)}; expected null or "zstd"')
    shards = tuple(
        _shard_from_json(path, shard, f"shards[{n}]")
        for n, shard in enumerate(_field(path, content, "shards", list))
    )
    manifest = Manifest(_tokenizer_from_json(path, content), compression, shards)
    derived = {"dtype": manifest.dtype.name, "documents": manifest.documents, "tokens": manifest.tokens}
    for key, expected in derived.items():
        if type(content.get(key)) is not type(expected) or content[key] != expected:
            raise DataError(f"{path}: {key} is {_show(content.get(key))} but its parts make {expected}")
    if not manifest.tokens:
        raise DataError(f"{path}: the dataset holds no tokens; build it again from text")
    if len({shard.file for shard in shards}) != len(shards):
        raise DataError(f"{path}: a shard file is listed twice; every shard has its own file")
    return manifest


def data_file(folder: Path, name: str) -> tuple[Path, int]:
    """Path and size of a regular file that lies inside `folder`.

    Raises:  DataError if it is missing, not a regular file, or a link that leaves the folder
    """
    path = folder / name
    try:
        status = path.stat()
        inside = path.resolve().is_relative_to(folder.resolve())
    except FileNotFoundError:
        raise DataError(f"{path} is missing; restore it or rebuild the dataset") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a regular file")
    if not inside:
        raise DataError(f"{path} links out of {folder}; put the file itself into the folder")
    return path, status.st_size


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise DataError(f"no dataset folder {path.parent}; make one with: megalite data tokenize --to …")
    if not path.exists():
        inside = [child.name for child in (path.parent / "train", path.parent / "valid") if child.is_dir()]
        hint = f"did you mean {path.parent / inside[0]}?" if inside else "it is not a finished dataset"
        raise DataError(f"{path.parent} holds no {MANIFEST_FILE}; {hint}")
    _, size = data_file(path.parent, path.name)
    if size > MAX_MANIFEST_BYTES:
        raise DataError(f"{path} has {size} bytes; a manifest has at most {MAX_MANIFEST_BYTES}")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}; restore it or rebuild the dataset") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {_show(content)}")
    return content


def _crc(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _shard_to_json(shard: ShardInfo) -> dict[str, Any]:
    columns = {name: shard.batches[:, n].tolist() for n, name in enumerate(BATCH_COLUMNS)}
    return {"file": shard.file, "bytes": shard.bytes, "crc32": shard.crc32, "batches": columns}


def _shard_from_json(path: Path, shard: Any, where: str) -> ShardInfo:
    if not isinstance(shard, dict):
        raise DataError(f"{path}: {where} is {_show(shard)}; expected an object")
    file = _field(path, shard, "file", str, where)
    # A plain name and nothing else: no separators, no "..", no hidden files, no drive letters.
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}", file):
        raise DataError(f"{path}: {where}.file is {_show(file)}; expected a plain file name")
    size, crc = (_field(path, shard, key, int, where) for key in ("bytes", "crc32"))
    table = _field(path, shard, "batches", dict, where)
    columns = [_field(path, table, key, list, f"{where}.batches") for key in BATCH_COLUMNS]
    if len({len(column) for column in columns}) != 1 or not columns[0]:
        raise DataError(f"{path}: {where}.batches has columns of lengths {[len(c) for c in columns]}")
    if any(type(value) is not int or not 0 <= value < 2**53 for column in columns for value in column):
        raise DataError(f"{path}: {where}.batches holds something that is not an integer in [0, 2^53)")
    batches = np.array(columns, dtype=np.int64).T
    ends = batches[:, OFFSET] + batches[:, BYTES]
    if ends[-1] > size or (batches[1:, OFFSET] < ends[:-1]).any():
        raise DataError(f"{path}: {where}.batches overlap or reach beyond the file's {size} bytes")
    documents, tokens = batches[:, DOCUMENTS], batches[:, TOKENS]
    if (documents < 1).any() or (documents > tokens).any() or (tokens >= 2**31).any():
        raise DataError(f"{path}: {where}.batches counts are out of range; 1 ≤ documents ≤ tokens < 2^31")
    return ShardInfo(file, size, crc, batches)


def _tokenizer_from_json(path: Path, content: Mapping[str, Any]) -> TokenizerInfo:
    table = _field(path, content, "tokenizer", dict)
    kind, fingerprint = (_field(path, table, key, str, "tokenizer") for key in ("kind", "fingerprint"))
    vocab_size, eos_id = (_field(path, table, key, int, "tokenizer") for key in ("vocab_size", "eos_id"))
    if not eos_id < vocab_size <= 1 << 32:
        raise DataError(f"{path}: tokenizer.eos_id={eos_id} is not below vocab_size={vocab_size} ≤ 2^32")
    return TokenizerInfo(kind, fingerprint, vocab_size, eos_id)


def _field(path: Path, table: Mapping[str, Any], key: str, kind: type[T], where: str = "") -> T:
    name = f"{where}.{key}" if where else key
    if key not in table:
        raise DataError(f"{path}: key {name} is missing; restore the file or rebuild the dataset")
    value = table[key]
    if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**53):
        expected = {int: "an integer in [0, 2^53)", str: "a string", dict: "an object", list: "a list"}
        raise DataError(f"{path}: {name} is {_show(value)}; expected {expected[kind]}")
    return value


def _show(value: Any) -> str:
    """A value from an untrusted file, short enough for one line."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:60]}…"
