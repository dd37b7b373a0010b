"""Shards fetched or unpacked once per machine, kept on its disk within a limit of bytes.

All processes of a machine share one folder without a server, by file locks alone. A lock belongs to
an open file, so the kernel drops it with the process, however that dies:

    <key>         a finished shard; whoever has it mapped holds a shared lock on it
    <key>.part    a shard being filled, by the holder of the exclusive lock on it
    .lock         held exclusively while room is made or a part gets its name

What is unlocked may be removed, least recently used first. A name only ever leads to a finished
file, since a part gets its name by rename.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megalite.data.folder import disk_errors
from megalite.errors import DataError

CACHE_VARIABLE = "MEGALITE_CACHE"
SIZE_VARIABLE = "MEGALITE_CACHE_GIB"
MAX_GIB = 64.0
POLL_S = 0.02

_REMEDY = f"raise {SIZE_VARIABLE}"

Fill = Callable[[], Iterable[bytes]]


class CacheFullError(DataError):
    """All that the cache holds is in use, and what is asked for does not fit beside it."""


class ShardCache:
    """A folder of whole Arrow files, at most `max_bytes` in all: by default `$MEGALITE_CACHE_GIB`, or 64 GiB.

    The folder is `$MEGALITE_CACHE`, or `~/.cache/megalite/shards`, and should be on a local disk.

    Raises:  DataError if the environment names a size that is none
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int | None = None) -> None:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megalite" / "shards"
        self.folder = Path(folder or os.environ.get(CACHE_VARIABLE) or default)
        self.max_bytes = _default_bytes() if max_bytes is None else max_bytes

    def map(self, key: str, size: int, fill: Fill) -> mmap.mmap:
        """The file `key` of `size` bytes, mapped; if it is not there, made of the bytes `fill()` yields.

        While the map or a view of it lives, the file is not removed. Of several processes that ask at
        once, one fills and the others wait.

        Raises:  CacheFullError; DataError if the disk refuses or `fill` yields another number of bytes;
                 whatever `fill` raises
        """
        if size > self.max_bytes:
            raise DataError(f"a shard of {size} bytes does not fit into {self._limit}; {_REMEDY}")
        with disk_errors(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        while (found := self._map_finished(key, size)) is None:
            self._fill(key, size, fill)
        return found

    def remove(self, key: str) -> None:
        """Forget a file. Whoever has it mapped keeps its bytes."""
        with disk_errors(self.folder):
            (self.folder / key).unlink(missing_ok=True)

    @property
    def _limit(self) -> str:
        return f"the cache {self.folder}, limited to {self.max_bytes} bytes"

    def _map_finished(self, key: str, size: int) -> mmap.mmap | None:
        path = self.folder / key
        with _locked(path, fcntl.LOCK_SH) as file:
            if file is None:
                return None
            if os.fstat(file).st_size != size:
                path.unlink(missing_ok=True)
                return None
            os.utime(file)  # the mark of its last use
            # The map keeps a duplicate of the descriptor, and with it the lock, until nobody views it.
            return mmap.mmap(file, size, access=mmap.ACCESS_READ)

    def _fill(self, key: str, size: int, fill: Fill) -> None:
        """Make the file, or return early if another process has made it meanwhile."""
        path, part = self.folder / key, self.folder / f"{key}.part"
        with disk_errors(part):
            os.close(os.open(part, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        with _locked(part, fcntl.LOCK_EX | fcntl.LOCK_NB) as file:
            if file is None:  # another process fills it
                time.sleep(POLL_S)
                return
            if path.exists():
                part.unlink()
                return
            try:
                self._reserve(file, size)
                done = 0
                for chunk in fill():
                    done += len(chunk)
                    if done > size:
                        break
                    with disk_errors(part):
                        _write(file, chunk)
                if done != size:
                    raise DataError(
                        f"{key} has {'more than ' * (done > size)}{min(done, size)} bytes, not {size}"
                    )
                with disk_errors(path), self._names_locked():
                    part.rename(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _reserve(self, part: int, size: int) -> None:
        """Make room and take it, by giving the part its final size before it has content."""
        while not self._has_room(part, size):
            time.sleep(POLL_S)

    def _has_room(self, part: int, size: int) -> bool:
        """Whether room was made and taken; False if that may be once others have filled what they fill."""
        with disk_errors(self.folder), self._names_locked():
            os.ftruncate(part, 0)
            entries = self._entries()
            excess = sum(status.st_size for _, status in entries) + size - self.max_bytes
            is_filling = False
            for path, status in entries:
                if excess <= 0:
                    break
                with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as file:
                    if file is not None:
                        path.unlink()
                        excess -= status.st_size
                    elif path.suffix == ".part" and status.st_size:
                        is_filling = True
            if excess <= 0:
                os.ftruncate(part, size)
            elif not is_filling:
                raise CacheFullError(
                    f"no room for {size} bytes in {self._limit}: the rest is in use; {_REMEDY}"
                )
            return excess <= 0

    @contextmanager
    def _names_locked(self) -> Iterator[None]:
        """While this is held, no file is reserved, renamed or removed to make room."""
        flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(self.folder / ".lock", flags, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _entries(self) -> list[tuple[Path, os.stat_result]]:
        """Finished and unfinished files, the least recently used first."""
        entries = []
        with os.scandir(self.folder) as found:
            for entry in found:
                with suppress(FileNotFoundError):
                    if entry.name != ".lock" and entry.is_file(follow_symlinks=False):
                        entries.append((Path(entry.path), entry.stat(follow_symlinks=False)))
        return sorted(entries, key=lambda item: (item[1].st_mtime_ns, item[0]))


def _default_bytes() -> int:
    text = os.environ.get(SIZE_VARIABLE) or str(MAX_GIB)
    try:
        size = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise DataError(f"{SIZE_VARIABLE}={text!r} is not a positive number of GiB, such as {MAX_GIB:g}")
    return size


@contextmanager
def _locked(path: Path, how: int) -> Iterator[int | None]:
    """The file at `path`, opened and locked; None if it is gone, or is locked and LOCK_NB given."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        raise DataError(f"cannot open {path}: {error.strerror}; check its permissions") from None
    try:
        try:
            fcntl.flock(file, how)
            # Between opening and locking it may have been removed or replaced.
            is_current = os.path.samestat(os.fstat(file), path.stat())
        except (BlockingIOError, FileNotFoundError):
            is_current = False
        yield file if is_current else None
    finally:
        os.close(file)


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
