"""Shards as memory maps: of the file itself, or of a cached copy if it is remote or compressed whole."""

from __future__ import annotations

import hashlib
import mmap
import threading
import weakref
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import zstandard

from megalite.data.cache import CacheFullError, ShardCache
from megalite.data.folder import Folder, LocalFolder
from megalite.data.manifest import Manifest, ShardInfo
from megalite.errors import DataError

OPEN_SHARDS = 64
OPEN_COPIES = 16  # fewer, because the cache can remove only what nobody has open
MAX_WINDOW_BYTES = 8 << 20  # of a zstd stream: memory its reading may take
FETCH_THREADS = 2


class CorruptShardError(DataError):
    """A shard as a whole cannot be unpacked, so that none of its record batches can be read."""


_with_copies: weakref.WeakSet[ShardMaps] = weakref.WeakSet()  # all of this process


class ShardMaps:
    """The shards of one dataset, mapped when asked for; a bounded number stays open.

    `on_close` is called with a shard's number when its map is let go of. It is a weak reference, so
    that its owner and the files go as soon as nobody uses them.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        cache: ShardCache | None,
        on_close: weakref.WeakMethod[Callable[[int], None]],
    ) -> None:
        self._folder = folder
        self._local = folder if isinstance(folder, LocalFolder) else None
        self._shards = manifest.shards
        self._is_packed = manifest.compression == "zstd-shard"
        self.are_copies = self._local is None or self._is_packed
        self._on_close = on_close
        self._open: OrderedDict[int, tuple[mmap.mmap, pa.Buffer]] = OrderedDict()
        self._lock = threading.Lock()
        self._unusable: dict[int, str] = {}
        self._wanted: deque[int] = deque(maxlen=OPEN_COPIES)
        self._fetching = 0
        if self.are_copies:
            _with_copies.add(self)
            self._cache = cache or ShardCache()
            place = str(self._local.path.resolve()) if self._local else folder.name
            self._prefix = hashlib.sha256(f"{place}\0{manifest.digest}".encode()).hexdigest()[:24]

    def map(self, number: int) -> pa.Buffer:
        """The Arrow file of shard `number`.

        Raises:  CorruptShardError; DataError if the shard is missing, of another size or out of reach
        """
        with self._lock:
            if (found := self._open.get(number)) is not None:
                self._open.move_to_end(number)
                return found[1]
        mapped = self._map(number)
        buffer = pa.py_buffer(mapped)
        with self._lock:
            self._open[number] = mapped, buffer
            limit = OPEN_COPIES if self.are_copies else OPEN_SHARDS
            closed = [self._open.popitem(last=False)[0] for _ in range(len(self._open) - limit)]
        self._tell_closed(closed)
        return buffer

    def renew(self, number: int) -> None:
        """Let go of a copy that turned out damaged, so that the next `map` makes it anew."""
        with self._lock:
            self._open.pop(number, None)
        self._tell_closed([number])
        self._cache.remove(self._key(number))

    def prefetch(self, number: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Begin to read [start, stop) ranges of a shard's Arrow file, or to make a copy; return at once.

        Errors are left to the reader, who meets them again.
        """
        if self.are_copies:
            self._fetch_later(number)
            return
        try:
            self.map(number)
        except DataError:
            return
        with self._lock:
            found = self._open.get(number)
        if found is not None:
            for start, stop in ranges:
                start -= start % mmap.PAGESIZE
                found[0].madvise(mmap.MADV_WILLNEED, start, stop - start)

    def release(self) -> None:
        """Take the maps' pages out of this process. They stay in the page cache, and whoever views one finds
        the same bytes."""
        with self._lock:
            opened = [mapped for mapped, _ in self._open.values()]
        for mapped in opened:
            mapped.madvise(mmap.MADV_DONTNEED)

    def _tell_closed(self, numbers: list[int]) -> None:
        if (tell := self._on_close()) is not None:
            for number in numbers:
                tell(number)

    def _fetch_later(self, number: int) -> None:
        with self._lock:
            if number in self._open or number in self._wanted or number in self._unusable:
                return
            self._wanted.append(number)
            if self._fetching == FETCH_THREADS:
                return
            self._fetching += 1
        # A daemon: a process that ends in the middle of a shard leaves nothing that would harm.
        threading.Thread(target=self._fetch_wanted, name="megalite-fetch", daemon=True).start()

    def _fetch_wanted(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._fetching -= 1
                    return
                number = self._wanted.popleft()
            try:
                self._copy(number)
            except DataError:
                continue

    def _map(self, number: int) -> mmap.mmap:
        if self._local is not None and not self._is_packed:
            shard = self._shards[number]
            return self._local.map(shard.file, shard.bytes)
        try:
            return self._copy(number)
        except CacheFullError:  # what this process holds open may be in the way, of any source of its mixture
            for maps in list(_with_copies):
                maps._let_go()
            return self._copy(number)

    def _let_go(self) -> None:
        with self._lock:
            closed = list(self._open)
            self._open.clear()
        self._tell_closed(closed)

    def _copy(self, number: int) -> mmap.mmap:
        if number in self._unusable:
            raise CorruptShardError(self._unusable[number])
        shard = self._shards[number]
        key = self._key(number)
        try:
            if self._local is None:
                try:
                    return self._cache.map(key, shard.arrow_bytes, lambda: self._content(shard, strict=True))
                except CorruptShardError:  # perhaps only on its way here
                    pass
            # Its record batches have CRCs of their own: the sound ones are still of use.
            return self._cache.map(key, shard.arrow_bytes, lambda: self._content(shard, strict=False))
        except CorruptShardError as error:
            self._unusable[number] = str(error)
            raise

    def _content(self, shard: ShardInfo, strict: bool) -> Iterator[bytes]:
        """The Arrow file's bytes; `strict` also holds the stored file to its CRC."""
        crc = 0

        def stored() -> Iterator[bytes]:
            nonlocal crc
            for chunk in self._folder.stream(shard.file, shard.bytes):
                crc = zlib.crc32(chunk, crc)
                yield chunk

        if self._is_packed:
            yield from unpack(stored(), shard.arrow_bytes)
        else:
            yield from stored()
        if strict and crc != shard.crc32:
            raise CorruptShardError(f"the file has CRC {crc:#010x}, expected {shard.crc32:#010x}")

    def _key(self, number: int) -> str:
        return f"{self._prefix}-{self._shards[number].file.removesuffix('.zst')}"


def unpack(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Decompress one zstd frame of exactly `size` bytes, in memory bounded by its window.

    Raises:  CorruptShardError if it is damaged, needs a larger window or has another size
    """
    source: Any = _Reader(chunks)
    reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).stream_reader(source)
    done = 0
    try:
        while chunk := reader.read(1 << 20):
            done += len(chunk)
            if done > size:
                raise CorruptShardError(f"it unpacks to more than the {size} bytes expected")
            yield chunk
    except zstandard.ZstdError as error:
        raise CorruptShardError(f"its zstd stream is damaged: {error}") from None
    if done != size:
        raise CorruptShardError(f"it unpacks to {done} bytes, expected {size}")
    for _ in chunks:  # whatever follows the frame still counts for the file's CRC
        pass


class _Reader:
    """Chunks as a file that can be read."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        part, self._rest = self._rest[:size], self._rest[size:]
        return bytes(part)
