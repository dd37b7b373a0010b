"""Datasets read over the network through fsspec: http(s), s3, gs and whatever else it knows.

A file is one stream. When a stream breaks, it is opened again where it broke, after a pause that
doubles each time; only failures without progress in between count towards the last one.
"""

from __future__ import annotations

import importlib
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalite.data.folder import CHUNK_BYTES, Folder, LocalFolder, check_size
from megalite.errors import DataError

ATTEMPTS = 6  # about half a minute in all
PAUSE_S = 1.0  # after the first failure
SILENCE_S = 60.0  # a connection that sends nothing for so long is broken


def is_remote(path: str | Path) -> bool:
    """Whether a dataset's path is an address, such as `s3://bucket/data`."""
    return "://" in str(path)


def open_folder(path: str | Path) -> Folder:
    """The folder at a path, or at an address if it has `://` in it.

    Raises:  DataError if what reaches the address is not installed
    """
    return RemoteFolder(str(path)) if is_remote(path) else LocalFolder(path)


class RemoteFolder:
    """A dataset's folder at an address.

    Raises:  DataError if fsspec, or what it needs for this kind of address, is not installed
    """

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        self._is_http = self.name.startswith(("http://", "https://"))
        self._files = _file_system(self.name)

    def locate(self, name: str) -> str:
        """The address of one of its files."""
        return f"{self.name}/{name}"

    def read(self, name: str, limit: int) -> bytes:
        """A whole file of at most `limit` bytes."""
        parts, size = [], 0
        for chunk in self._chunks(name):
            size += len(chunk)
            if size > limit:
                raise DataError(f"{self.locate(name)} has more than {limit} bytes, the most expected")
            parts.append(chunk)
        return b"".join(parts)

    def stream(self, name: str, size: int) -> Iterator[bytes]:
        """A file of exactly `size` bytes, in chunks."""
        done = 0
        for chunk in self._chunks(name, size):
            done += len(chunk)
            if done > size:
                break
            yield chunk
        check_size(self.locate(name), done, size)

    def _chunks(self, name: str, size: int = 0) -> Iterator[bytes]:
        """The file from beginning to end; one that ends before `size` counts as broken."""
        done = failures = 0
        while True:
            try:
                with self._open(name, done) as file:
                    while chunk := file.read(CHUNK_BYTES):
                        yield chunk
                        done, failures = done + len(chunk), 0
                if done < size:
                    raise EOFError(f"it ended after {done} of {size} bytes")
                return
            except (DataError, GeneratorExit):
                raise
            except Exception as error:  # each file system has error types of its own
                failures += 1
                if failures == ATTEMPTS or isinstance(error, FileNotFoundError | PermissionError):
                    raise DataError(
                        f"cannot read {self.locate(name)} after {failures} attempts: "
                        f"{type(error).__name__}: {str(error).partition(chr(10))[0]}; check the address, "
                        "the network and the credentials"
                    ) from None
                time.sleep(PAUSE_S * 2 ** (failures - 1) * random.uniform(0.5, 1.0))

    def _open(self, name: str, offset: int) -> Any:
        url = self.locate(name)
        if not self._is_http:
            file = self._files.open(url, "rb", block_size=CHUNK_BYTES, cache_type="none")
            file.seek(offset)
            return file
        # One request for everything: block_size=0 streams, and a given size saves asking for it.
        file = self._files.open(url, "rb", block_size=0, size=1)
        while offset:  # not every server can begin in the middle
            skipped = file.read(min(offset, CHUNK_BYTES))
            if not skipped:
                raise EOFError("it is shorter than before")
            offset -= len(skipped)
        return file


def _file_system(url: str) -> Any:
    try:
        fsspec = importlib.import_module("fsspec")
        options: dict[str, Any] = {}
        if url.startswith(("http://", "https://")):
            timeout = importlib.import_module("aiohttp").ClientTimeout(
                total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S
            )
            options["client_kwargs"] = {"timeout": timeout}
        return fsspec.filesystem(url.partition("://")[0], **options)
    except ImportError as error:
        raise DataError(
            f"{url}: {error}; reading from the network needs: pip install 'megalite[remote]'"
        ) from None
    except ValueError as error:
        raise DataError(f"{url}: {error}; use http(s), s3, gs or a path") from None
