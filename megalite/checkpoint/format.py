"""What a checkpoint is on disk: slices of logical tensors in safetensors files, and one manifest.

    step_00000100/
      rank_00000.safetensors    the slices rank 0 owned, one after another
      rank_00001.safetensors
      manifest.json             step, position, meta, and every file's slices with their CRCs

A slice is a flat row-major range of a logical tensor, so what is stored does not depend on how many
processes wrote it, and any number can read it.

The manifest carries the CRC of its own bytes, and everything else follows from it: the exact bytes of
every file's header and the place of every slice are computed, never parsed out of the file. So each
byte of a checkpoint is covered by exactly one check, and a hostile file has no offset to lie about.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from torch import Tensor

from megalite.errors import CheckpointError

MANIFEST = "manifest.json"
VERSION = 1
MAX_MANIFEST_BYTES = 8 << 20
MAX_MANIFEST_VALUES = 500_000  # about 40,000 slices; bounds the memory that parsing may take
_ITEM_BYTES = 4  # float32, the one dtype master weights and moments are kept in
_CHUNK_BYTES = 4 << 20  # read, written and checked at once
_SEAL = b'{"crc32": "%08x", "manifest": %s}\n'
_SEAL_HEAD = len(_SEAL % (0, b"")) - 2


@dataclass(frozen=True)
class TensorSlice:
    """A flat row-major range of a logical tensor, as one rank owns it.

    Shapes:  values [stop - start], fp32, on any device; shape is the logical tensor's
    """

    kind: str  # "weight", "exp_avg", "exp_avg_sq"
    name: str  # the logical parameter, e.g. "blocks.0.attention.qkv.weight"
    shape: tuple[int, ...]
    start: int
    stop: int
    values: Tensor


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SliceEntry(_Record):
    """One stored slice: which range of which tensor, and the CRC of its bytes."""

    kind: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$", max_length=512)]
    shape: tuple[Annotated[int, Field(ge=1, lt=2**48)], ...] = Field(max_length=8)
    start: int = Field(ge=0)
    stop: int
    dtype: Literal["F32"] = "F32"
    crc32: int = Field(ge=0, lt=2**32)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.start < self.stop <= math.prod(self.shape):
            raise ValueError(
                f"{self.kind} {self.name}: slice [{self.start}, {self.stop}) is empty or outside "
                f"shape {list(self.shape)}"
            )
        return self

    @property
    def bytes(self) -> int:
        """Bytes of the values in the file."""
        return (self.stop - self.start) * _ITEM_BYTES

    @property
    def key(self) -> str:
        """Its name in the safetensors file; "@" never occurs in a parameter's name."""
        whole = self.stop - self.start == math.prod(self.shape)
        return f"{self.kind}.{self.name}" if whole else f"{self.kind}.{self.name}@{self.start}"


class FileEntry(_Record):
    """One rank's file: its slices in stored order, from which its header and its size follow."""

    name: Annotated[str, StringConstraints(pattern=r"^rank_[0-9]{5,9}\.safetensors$")]
    bytes: int
    slices: Annotated[tuple[SliceEntry, ...], FailFast()] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        expected = len(file_header(self.slices)) + sum(entry.bytes for entry in self.slices)
        if self.bytes != expected:
            raise ValueError(f"{self.name}: bytes={self.bytes}, but its slices make {expected}")
        return self


class Manifest(_Record):
    """Everything about a checkpoint but the values.

    `position` counts samples consumed, `world` says what wrote it, `meta` belongs to the trainer.
    """

    format: Literal["megalite-checkpoint"] = "megalite-checkpoint"
    version: Literal[1] = 1
    step: int = Field(ge=0)
    position: int = Field(ge=0)
    world: dict[str, int]
    meta: dict[str, Any]
    files: Annotated[tuple[FileEntry, ...], FailFast()] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [file.name for file in self.files]
        if len(set(names)) < len(names):
            raise ValueError(f"{len(names) - len(set(names))} files are listed twice")
        _check_tiling(entry for file in self.files for entry in file.slices)
        return self


def _check_tiling(entries: Iterable[SliceEntry]) -> None:
    """Every tensor is covered from its first element to its last, once; all kinds hold the same tensors."""
    tensors: dict[tuple[str, str], list[SliceEntry]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        tensors.setdefault((entry.kind, entry.name), []).append(entry)
        if shapes.setdefault(entry.name, entry.shape) != entry.shape:
            raise ValueError(f"{entry.name} has shapes {list(shapes[entry.name])} and {list(entry.shape)}")
    for (kind, name), parts in tensors.items():
        reached, size = 0, math.prod(shapes[name])
        for part in sorted(parts, key=lambda part: part.start):
            if part.start != reached:
                fault = "missing" if part.start > reached else "stored twice"
                low, high = sorted((reached, part.start))
                raise ValueError(f"{kind} {name}: elements [{low}, {high}) are {fault}")
            reached = part.stop
        if reached != size:
            raise ValueError(f"{kind} {name}: elements [{reached}, {size}) are missing")
    for kind in {kind for kind, _ in tensors}:
        for name in shapes:
            if (kind, name) not in tensors:
                raise ValueError(f"{kind} {name} is missing; other tensors have their {kind}")


def file_header(slices: Sequence[SliceEntry]) -> bytes:
    """The safetensors header of a file that holds these slices one after another.

    A whole tensor keeps its shape, so any safetensors reader can use it; a part of one is flat.
    """
    table, offset = {}, 0
    for entry in slices:
        whole = entry.stop - entry.start == math.prod(entry.shape)
        table[entry.key] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape) if whole else [entry.stop - entry.start],
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_file(path: Path, slices: Sequence[TensorSlice]) -> FileEntry:
    """Write one rank's slices to a new file, in bounded memory, down to the disk.

    Raises:  CheckpointError if a slice is malformed; OSError as the file system has it
    """
    entries = [_describe(part) for part in slices]
    header = file_header(entries)
    with open(path, "xb") as file:
        file.write(header)
        for number, part in enumerate(slices):
            crc = 0
            for chunk in _chunks(part.values):
                crc = zlib.crc32(chunk, crc)
                file.write(chunk)
            entries[number] = entries[number].model_copy(update={"crc32": crc})
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return FileEntry(name=path.name, bytes=size, slices=tuple(entries))


def _describe(part: TensorSlice) -> SliceEntry:
    """The slice's entry, its CRC still to come."""
    values = part.values
    if values.dtype != torch.float32 or values.shape != (part.stop - part.start,):
        raise CheckpointError(
            f"{part.kind} {part.name}: slice [{part.start}, {part.stop}) has values {list(values.shape)} of "
            f"{values.dtype}; give [{part.stop - part.start}] of torch.float32"
        )
    try:
        return SliceEntry(
            kind=part.kind, name=part.name, shape=part.shape, start=part.start, stop=part.stop, crc32=0
        )
    except ValidationError as error:
        raise CheckpointError(explain(error)) from None


def _chunks(values: Tensor) -> Iterator[memoryview]:
    for piece in torch.split(values.detach(), _CHUNK_BYTES // _ITEM_BYTES):
        yield piece.cpu().contiguous().numpy().astype("<f4", copy=False).data.cast("B")


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's file: JSON, sealed with the CRC of its own bytes.

    Raises:  CheckpointError if `meta` is not JSON-able or the whole too long to be read again
    """
    try:
        body = json.dumps(manifest.model_dump(), separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"meta cannot be written as JSON: {error}") from None
    _check_length(body, "the manifest")
    return _SEAL % (zlib.crc32(body), body)


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest; nothing is allocated by a number found in it.

    Raises:  CheckpointError naming the file if it is missing, no plain file, too long, damaged, of
             another version, or describes slices that do not tile their tensors
    """
    with open_plain(path) as file:
        raw = file.read(MAX_MANIFEST_BYTES + 1)
    _check_length(raw, str(path))
    body = raw[_SEAL_HEAD:-2]
    if raw != _SEAL % (zlib.crc32(body), body):
        if re.match(rb'\s*\{\s*"format":\s*"megalite-shards"', raw):
            raise CheckpointError(f"{path.parent} is a dataset; give a run folder or a checkpoint")
        raise CheckpointError(f"{path} is damaged: its {len(raw):,} bytes do not match its own CRC")
    version = re.match(rb'\{"format":"megalite-checkpoint","version":(\d{1,9}),', body)
    if version and int(version[1]) != VERSION:
        raise CheckpointError(f"{path} has version {int(version[1])}; this megalite reads version {VERSION}")
    try:
        return Manifest.model_validate_json(body)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {explain(error)}") from None


def _check_length(text: bytes, what: str) -> None:
    values = sum(text.count(mark) for mark in (b",", b"[", b"{"))  # at least; parsing would allocate them
    if len(text) > MAX_MANIFEST_BYTES - len(_SEAL) or values > MAX_MANIFEST_VALUES:
        raise CheckpointError(
            f"{what} is no manifest to be read: over {MAX_MANIFEST_BYTES:,} bytes or "
            f"{MAX_MANIFEST_VALUES:,} values"
        )


def check_size(folder: Path, entry: FileEntry) -> None:
    """Compare a file's size with the manifest.

    Raises:  CheckpointError naming the file if it is missing, no plain file or of another size
    """
    with open_plain(folder / entry.name) as file:
        _check_size(file, folder / entry.name, entry)


def _check_size(file: FileIO, path: Path, entry: FileEntry) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != entry.bytes:
        raise CheckpointError(f"{path} has {size:,} bytes; the manifest says {entry.bytes:,}")


def verify_file(folder: Path, entry: FileEntry, advance: Callable[[int], None] = lambda count: None) -> None:
    """Read a rank's file once, in bounded memory, and compare every byte with the manifest.

    `advance` is told of the bytes as they are read.

    Raises:  CheckpointError naming the file and the first slice that differs
    """
    path = folder / entry.name
    header = file_header(entry.slices)
    buffer = memoryview(bytearray(max(_CHUNK_BYTES, len(header))))
    with open_plain(path) as file:
        _check_size(file, path, entry)
        read_exactly(file, buffer[: len(header)], 0)
        if buffer[: len(header)] != header:
            raise CheckpointError(f"{path} is damaged: its header is not the one the manifest describes")
        offset = len(header)
        for part in entry.slices:
            crc, end = 0, offset + part.bytes
            while offset < end:
                chunk = buffer[: min(_CHUNK_BYTES, end - offset)]
                read_exactly(file, chunk, offset)
                crc = zlib.crc32(chunk, crc)
                offset += len(chunk)
                advance(len(chunk))
            if crc != part.crc32:
                raise CheckpointError(
                    f"{path} is damaged: {part.kind} {part.name}[{part.start}:{part.stop}] has CRC "
                    f"{crc:08x}; the manifest says {part.crc32:08x}"
                )


def open_plain(path: Path) -> FileIO:
    """Open a regular file for reading, unbuffered; links, folders, pipes and devices are refused.

    Raises:  CheckpointError
    """
    try:
        # Non-blocking, so that a pipe put in the place of a file cannot hold the open up.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "it is a symbolic link" if path.is_symlink() else error.strerror
        raise CheckpointError(f"cannot open {path}: {reason}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"cannot open {path}: it is not a regular file")
    return FileIO(descriptor, "rb")


def read_exactly(file: FileIO, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from the file's bytes at `offset`.

    Raises:  CheckpointError if the file ends before, or cannot be read
    """
    done = 0
    while done < len(buffer):  # one call reads at most 2 GiB
        try:
            count = os.preadv(file.fileno(), [buffer[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(
                f"cannot read a checkpoint's file at byte {offset + done:,}: {error}"
            ) from None
        if count == 0:
            raise CheckpointError(f"a checkpoint's file ends at byte {offset + done:,}, inside a slice")
        done += count


def explain(error: ValidationError) -> str:
    """The first fault of a record on one line."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    place = ".".join(str(part) for part in first["loc"])
    seen = f"={first['input']!r:.60}" if first["type"] not in ("missing", "json_invalid") else ""
    return f"{place}{seen}: {first['msg']}" if place else first["msg"]
