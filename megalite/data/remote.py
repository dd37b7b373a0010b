"""Datasets read over the network through fsspec: http(s), s3, gs and whatever else it knows.

A file is one stream. When a stream breaks, it is opened again where it broke, after a pause that
doubles each time; only failures without progress in between count towards the last one. What is
refused is not asked for again.
"""

from __future__ import annotations

import importlib
import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalite.data.folder import CHUNK_BYTES, Folder, LocalFolder, check_size
from megalite.errors import DataError

ATTEMPTS = 6  # about half a minute in all
PAUSE_S = 1.0  # after the first failure
PATIENCE_S = 120.0  # without progress; some clients try again for long before they say so
REASON_CHARS = 300  # of a client's error in ours
SILENCE_S = 60.0  # a connection that sends nothing for so long is broken

# gcsfs logs every failed attempt with its traceback; the last one is in our error.
_SILENT = logging.NullHandler()

# Statuses that say what another attempt may change; all others from 300 to 499 refuse.
_PASSING = frozenset({408, 412, 416, 425, 429})
# By name, since the packages that have them need not be installed. What cannot be *renewed* in mid-run has
# other names, and may pass.
_NO_CREDENTIALS = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "SSOTokenLoadError",
        "UnauthorizedSSOTokenError",
        "DefaultCredentialsError",
    }
)


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
        progressed = time.monotonic()
        while True:
            try:
                with self._open(name, done, size) as file:
                    while chunk := file.read(CHUNK_BYTES):
                        yield chunk
                        done, failures, progressed = done + len(chunk), 0, time.monotonic()
                if done < size:
                    raise EOFError(f"it ended after {done} of {size} bytes")
                return
            except (DataError, GeneratorExit):
                raise
            except Exception as error:  # each file system has error types of its own
                failures += 1
                is_refused = _is_refused(error)
                waited = time.monotonic() - progressed
                if is_refused or failures == ATTEMPTS or (failures > 1 and waited > PATIENCE_S):
                    tried = "" if is_refused else f" after {failures} attempts"
                    raise DataError(
                        f"cannot read {self.locate(name)}{tried}: {type(error).__name__}: "
                        f"{_reason(error)}; {_remedy(error, is_refused)}"
                    ) from None
                time.sleep(PAUSE_S * 2 ** (failures - 1) * random.uniform(0.5, 1.0))

    def _open(self, name: str, offset: int, size: int) -> Any:
        url = self.locate(name)
        if not self._is_http:
            file = self._files.open(url, "rb", block_size=CHUNK_BYTES, cache_type="none")
            if size and file.size is not None:  # no network to blame
                check_size(url, file.size, size)
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
    protocol = url.partition("://")[0]
    try:
        fsspec = importlib.import_module("fsspec")
        options: dict[str, Any] = {}
        # Where a client would try again by itself, attempts would multiply: theirs are switched off.
        if protocol in ("http", "https"):
            timeout = importlib.import_module("aiohttp").ClientTimeout(
                total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S
            )
            options["client_kwargs"] = {"timeout": timeout}
        elif protocol in ("s3", "s3a"):
            once = {"retries": {"total_max_attempts": 1}, "read_timeout": SILENCE_S}
            options["config_kwargs"] = once
        elif protocol in ("gs", "gcs"):
            options["requests_timeout"] = SILENCE_S
            logging.getLogger("gcsfs").addHandler(_SILENT)
        files = fsspec.filesystem(protocol, **(options | fsspec.config.conf.get(protocol, {})))
        if protocol in ("s3", "s3a"):
            files.retries = 1
        return files
    except ImportError as error:
        raise DataError(
            f"{url}: {error}; reading from the network needs: pip install 'megalite[remote]'"
        ) from None
    except ValueError as error:
        raise DataError(f"{url}: {error}; use http(s), s3, gs or a path") from None


def _is_refused(error: Exception) -> bool:
    """Whether another attempt would end the same way: the file or the right to read it is missing, or the
    request is wrong."""
    if isinstance(error, TimeoutError):  # S3 gives one the status 400
        return False
    if isinstance(error, FileNotFoundError | PermissionError | ValueError):
        return True
    status = _status(error)
    if 300 <= status < 500:
        return status not in _PASSING
    # gcsfs has no type for a 403, nor its status.
    return type(error).__name__ in _NO_CREDENTIALS or str(error).startswith("Forbidden")


def _status(error: BaseException) -> int:
    """The HTTP status a server answered with, as far as the client's error tells; 0 if it does not."""
    if (cause := error.__cause__) is not None:
        # s3fs hides botocore's error behind its own; a cause of aiohttp's is an answer it could not read,
        # to which it gives a status by itself.
        response = getattr(cause, "response", None)
        found = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        return int(found.get("HTTPStatusCode", 0))
    status = str(getattr(error, "status", None) or getattr(error, "code", None))  # aiohttp, gcsfs
    return int(status) if status.isdigit() else 0


def _reason(error: Exception) -> str:
    """An error's first line. Clients quote what they could not understand, which may be half a shard."""
    line = str(error).partition("\n")[0]
    return line if len(line) <= REASON_CHARS else f"{line[:REASON_CHARS]}…"


def _remedy(error: Exception, is_refused: bool) -> str:
    """What a user can do about it."""
    if isinstance(error, FileNotFoundError):
        return "check the address: a dataset's is that of the folder with its manifest.json"
    if is_refused:
        return "check the address, the credentials, and that they allow reading"
    return "check the address and the network"
