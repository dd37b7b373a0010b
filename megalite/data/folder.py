"""A dataset's folder, on this machine or elsewhere: small files read whole, shards as streams.

Files are opened without following links and must be regular, so nothing read lies outside.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from megalite.errors import DataError

CHUNK_BYTES = 4 << 20
REMEDY = "restore the file or rebuild the dataset"


class Folder(Protocol):
    """What a dataset needs of the place where its files are."""

    @property
    def name(self) -> str:
        """Its path or address."""

    def locate(self, name: str) -> str:
        """The path or address of one of its files."""

    def read(self, name: str, limit: int) -> bytes:
        """A whole file of at most `limit` bytes.

        Raises:  DataError if it is missing, larger, not a regular file, or cannot be read
        """

    def stream(self, name: str, size: int) -> Iterator[bytes]:
        """A file of exactly `size` bytes, in chunks.

        Raises:  DataError if it is missing, of another size, not a regular file, or cannot be read
        """


class LocalFolder:
    """A folder of this machine's file system."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.path)

    def locate(self, name: str) -> str:
        """The path of one of its files."""
        return str(self.path / name)

    def read(self, name: str, limit: int) -> bytes:
        """A whole file of at most `limit` bytes."""
        path = self.path / name
        with open_file(path) as file:
            if (size := os.fstat(file).st_size) > limit:
                raise DataError(f"{path} has {size} bytes, at most {limit} are expected")
            with disk_errors(path, "read"), os.fdopen(os.dup(file), "rb") as stream:
                try:
                    return stream.read(size)
                except MemoryError:
                    raise DataError(f"{path} has {size} bytes, which do not fit into memory") from None

    def stream(self, name: str, size: int) -> Iterator[bytes]:
        """A file of exactly `size` bytes, in chunks."""
        path = self.path / name
        with open_file(path) as file:
            check_size(str(path), os.fstat(file).st_size, size)
            with disk_errors(path, "read"):
                while chunk := os.read(file, CHUNK_BYTES):
                    yield chunk

    def check(self, name: str, size: int) -> None:
        """Raises:  DataError if a file is missing, not a regular file, or not of exactly `size` bytes"""
        path = self.path / name
        with open_file(path) as file:
            check_size(str(path), os.fstat(file).st_size, size)

    def map(self, name: str, size: int) -> mmap.mmap:
        """A file of exactly `size` bytes, mapped into memory for reading."""
        path = self.path / name
        with open_file(path) as file:
            check_size(str(path), os.fstat(file).st_size, size)
            with disk_errors(path, "read"):
                return mmap.mmap(file, size, access=mmap.ACCESS_READ)


@contextmanager
def open_file(path: Path) -> Iterator[int]:
    """A file descriptor of a regular file, opened for reading and closed at the end.

    Raises:  DataError if it is missing, a link, or anything else but a regular file
    """
    try:
        # Without O_NONBLOCK a pipe would wait for its writer.
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {REMEDY}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise DataError(f"{path} is a link; put the file itself into the folder") from None
        raise DataError(f"cannot read {path}: {error}; check its permissions") from None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise DataError(f"{path} is not a regular file")
        yield file
    finally:
        os.close(file)


def check_size(name: str, found: int, expected: int) -> None:
    """Raises:  DataError if a file has not the size the manifest says"""
    if found != expected:
        raise DataError(f"{name} has {found} bytes, expected {expected}; {REMEDY}")


@contextmanager
def disk_errors(path: Path, action: str = "write") -> Iterator[None]:
    """Turn an operating system's refusal into the one line a user needs."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot {action} {path}: {reason}; check space and permissions") from None
