"""Files as streams of bytes, packed or not, that say where they break and refuse to grow without end.

gzip and zstd are unpacked member by member, so that all that precedes a break is handed on.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from data_tools.ingest.found import HEAD_BYTES, Reason

STEP_BYTES = {".gz": 8 << 10, ".zst": 2 << 10}  # unpacked at once: at most 8 and 64 MiB come out
READ_BYTES = 256 << 10
BUFFER_BYTES = 1 << 20
SEARCH_BYTES = 1 << 20
MAX_WINDOW_BYTES = 128 << 20
# More than text can be packed: gzip reaches 1032 on zeros alone.
MAX_RATIO, ALWAYS_ALLOWED_BYTES = 1000, 1 << 30
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"


class BrokenStreamError(Exception):
    """Nothing more can be read: the reason, and the detail for people."""

    def __init__(self, reason: Reason, why: str) -> None:
        super().__init__(why)
        self.reason, self.why = reason, why


class ByteStream(io.RawIOBase):
    """The bytes of a file, unpacked if its name ends in .gz or .zst.

    Raises:  BrokenStreamError when read, after everything before the break was handed on
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        super().__init__()
        self._packing = path.suffix.lower() if path.suffix.lower() in STEP_BYTES else None
        try:
            self._file = io.BufferedReader(io.FileIO(path), READ_BYTES)
            self._file.seek(start)
        except OSError as error:
            raise _unreadable(error) from None
        self._member: Any = None
        self._packed = b""  # not unpacked yet
        self._ready = memoryview(b"")  # unpacked and not handed on yet
        self._read = self._unpacked = 0
        self._member_start = 0

    def close(self) -> None:
        """Close the file."""
        if hasattr(self, "_file"):  # else it could not be opened, and Python closes what is left
            self._file.close()
        super().close()

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one step goes; 0 at the end."""
        if self._packing is None:
            try:
                return self._file.readinto(buffer)
            except OSError as error:
                raise _unreadable(error) from None
        while not self._ready:
            if not self._unpack():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def skip_member(self) -> bool:
        """After a break, go on where the next member seems to begin; False if there is none."""
        if self._packing is None:
            return False
        magic = GZIP_MAGIC if self._packing == ".gz" else ZSTD_MAGIC
        self._member, self._packed, self._ready = None, b"", memoryview(b"")
        try:
            at = self._find(magic, self._member_start + 1)
            while at is not None and not self._is_member(at):
                at = self._find(magic, at + 1)
            if at is not None:
                self._read = self._file.seek(at)
        except OSError as error:
            raise _unreadable(error) from None
        return at is not None

    def _find(self, magic: bytes, start: int) -> int | None:
        """Where the next such bytes are at or after `start`."""
        self._file.seek(start)
        window, at = b"", start
        while chunk := self._file.read(SEARCH_BYTES):
            window += chunk
            if (found := window.find(magic)) >= 0:
                return at + found
            at += max(0, len(window) - len(magic) + 1)
            window = window[1 - len(magic) :]
        return None

    def _is_member(self, at: int) -> bool:
        """Whether what begins there can be unpacked for a while: three bytes alone are met by chance."""
        self._file.seek(at)
        try:
            _decompressor(self._packing).decompress(self._file.read(STEP_BYTES[".zst"]))
        except (zlib.error, zstandard.ZstdError):
            return False
        return True

    def _unpack(self) -> bool:
        """One step; False at a clean end."""
        self._ready = memoryview(b"")  # lets go of the last step's
        if not self._packed:
            try:
                self._packed = self._file.read(STEP_BYTES[str(self._packing)])
            except OSError as error:
                raise _unreadable(error) from None
            self._read += len(self._packed)
        if self._member is None:
            if self._packing == ".gz" and self._unpacked:
                self._packed = self._packed.lstrip(b"\0")  # tapes and disks pad with them
            if not self._packed:
                return self._read_on_after_padding()
            self._member = _decompressor(self._packing)
            self._member_start = self._read - len(self._packed)
        elif not self._packed:
            raise BrokenStreamError(Reason.BREAKS_OFF, "it ends within compressed data")
        try:
            self._ready = memoryview(self._member.decompress(self._packed))
        except (zlib.error, zstandard.ZstdError) as error:
            raise BrokenStreamError(Reason.BREAKS_OFF, str(error)) from None
        self._packed = self._member.unused_data if self._member.eof else b""
        if self._member.eof:
            self._member = None
        self._unpacked += len(self._ready)
        if self._unpacked > max(ALWAYS_ALLOWED_BYTES, MAX_RATIO * self._read):
            why = f"{self._unpacked} bytes out of the first {self._read}"
            raise BrokenStreamError(Reason.BOMB, why)
        return True

    def _read_on_after_padding(self) -> bool:
        """Whether the file goes on after what was skipped."""
        at = self._file.tell()
        if not self._file.read(1):
            return False
        self._file.seek(at)
        return True


def _decompressor(packing: str | None) -> Any:
    if packing == ".gz":
        return zlib.decompressobj(zlib.MAX_WBITS | 16)
    return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()


def _unreadable(error: OSError) -> BrokenStreamError:
    return BrokenStreamError(Reason.UNREADABLE, error.strerror or str(error))


def open_bytes(path: Path, start: int = 0) -> io.BufferedReader:
    """A file's bytes from `start`, unpacked, buffered.

    Raises:  BrokenStreamError, then or when read
    """
    return buffered(ByteStream(path, start))


def buffered(raw: Any) -> io.BufferedReader:
    """A stream with a buffer before it, for lines."""
    return io.BufferedReader(raw, BUFFER_BYTES)


class Line(NamedTuple):
    """One line with its end, its number from 1, its first byte's position; of one too long, its head."""

    number: int
    at: int
    data: bytes
    size: int
    is_whole: bool


def lines(stream: io.BufferedReader, limit: int, start: int = 0, end: int | None = None) -> Iterator[Line]:
    """Lines that begin at start ≤ byte < end, none held that is longer than `limit`.

    The stream stands at `start`, or one byte before it if that is not 0, to see whether a line begins there.

    Raises:  BrokenStreamError
    """
    at, number = start, 0
    if start:
        skipped = _skip_line(stream, None if end is None else end - start + 1)
        at = start - 1 + skipped
    while (end is None or at < end) and (data := stream.readline(limit + 1)):
        number += 1
        size = len(data)
        is_whole = size <= limit or data.endswith(b"\n")
        if not is_whole:
            data = data[:HEAD_BYTES]
            size += _skip_line(stream, None)
        yield Line(number, at, data, size, is_whole)
        at += size


def _skip_line(stream: io.BufferedReader, at_most: int | None) -> int:
    """Read to the next line's begin or at least `at_most` bytes; how many were read."""
    skipped = 0
    while (at_most is None or skipped < at_most) and (piece := stream.readline(SEARCH_BYTES)):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped
