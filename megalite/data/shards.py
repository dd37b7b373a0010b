"""The shard format: documents of token ids in Arrow files, written once, read by memory map.

A dataset is a folder, on this machine or at an address:

    manifest.json                            counts, offsets and CRCs of everything below
    tokenizer.json [tokenizer_config.json]   what the ids mean
    shard_00000.arrow[.zst] …                Arrow IPC files, documents in stored order

A record batch has the columns `tokens: list<uint16 | uint32>`, `doc_id: string`, `source: string`
and perhaps `loss_mask: list<uint32>`; one row is one document, its end-of-document token included.
Any Arrow reader opens the files; this one goes straight to a batch by its manifest offset and
trusts a byte only after the batch's CRC.
"""

from __future__ import annotations

import threading
import weakref
import zlib
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megalite.data.cache import ShardCache
from megalite.data.folder import CHUNK_BYTES, REMEDY, LocalFolder
from megalite.data.ipc import REFUSALS, Parts, decode, shard_schema
from megalite.data.manifest import (
    BYTES,
    MANIFEST_FILE,
    OFFSET,
    TOKENS,
    TokenizerInfo,
    load_manifest,
)
from megalite.data.maps import CorruptShardError, ShardMaps
from megalite.data.remote import is_remote, open_folder
from megalite.data.tokenizer import MAX_TOKENIZER_BYTES, TOKENIZER_FILE, fingerprint
from megalite.errors import DataError

OPEN_BLOCKS = 512
OPEN_BLOCKS_BYTES = 64 << 20  # of blocks that are not views of a map: unpacked, or with a loss mask
MAPPED_BYTES = 96 << 20  # of blocks opened until the pages of all are let go of

_NO_BOUNDARIES = np.empty(0, dtype=np.int64)
_NO_BOUNDARIES.setflags(write=False)


class Document(NamedTuple):
    """One stored document: tokens uint16|uint32 [tokens], read-only, its eos included.

    `loss_mask` is bool [tokens], or None where every token counts for the loss.
    """

    doc_id: str
    source: str
    tokens: NDArray[Any]
    loss_mask: NDArray[np.bool_] | None = None


class Span(NamedTuple):
    """A piece of the stream: tokens uint16|uint32 [n] and what is known of them.

    Shapes:  boundaries int64 [documents that begin here], places in [0, n), ascending; loss_mask bool [n],
             whether a token counts for the loss, or None where all of the dataset's do
    """

    tokens: NDArray[Any]
    boundaries: NDArray[np.int64]
    loss_mask: NDArray[np.bool_] | None


class Block:
    """An opened record batch: whole documents, checked, in arrays that must not be written to.

    Shapes:  tokens uint16|uint32 [n]; offsets int32 [documents + 1], strictly ascending from 0 to n: document
             d is tokens[offsets[d]:offsets[d + 1]]; loss_mask bool [n], or None where every token counts
    """

    __slots__ = ("_names", "_refuse", "loss_mask", "offsets", "places", "tokens")

    def __init__(self, parts: Parts, refuse: Callable[[Exception], DataError]) -> None:
        self.tokens, self.offsets, self.loss_mask, self._names = parts
        self._refuse = refuse
        self.places = self.offsets.data  # the same numbers; bisect is faster on these

    def span(self, start: int, stop: int) -> Span:
        """Tokens [start, stop) of the block, 0 ≤ start < stop ≤ n, as views where that is possible."""
        boundaries = _NO_BOUNDARIES
        first = bisect_left(self.places, start)
        if self.places[first] < stop:
            last = bisect_left(self.places, stop, first)
            boundaries = np.subtract(self.offsets[first:last], start, dtype=np.int64)
        mask = None if self.loss_mask is None else self.loss_mask[start:stop]
        return Span(self.tokens[start:stop], boundaries, mask)

    @property
    def doc_ids(self) -> list[str]:
        """The documents' names, made into strings when asked for.

        Raises:  CorruptBlockError if they are not what they should be
        """
        names: list[str] = self._column("doc_id").to_pylist()
        return names

    @property
    def sources(self) -> list[str]:
        """The documents' sources, made into strings when asked for.

        Raises:  CorruptBlockError if they are not what they should be
        """
        names: list[str] = self._column("source").to_pylist()
        return names

    def encoded_sources(self) -> tuple[NDArray[np.int32], list[str]]:
        """Sources as numbers: int32 [documents], each a place in the list of names.

        Raises:  CorruptBlockError if they are not what they should be
        """
        encoded = self._column("source").dictionary_encode()
        return encoded.indices.to_numpy(), encoded.dictionary.to_pylist()

    def check_names(self) -> None:
        """What only those who ask for names need to be sound.

        Raises:  CorruptBlockError
        """
        self._column("doc_id")

    def _column(self, name: str) -> pa.Array:
        try:
            return self._names().column(name)
        except REFUSALS as error:
            raise self._refuse(error) from None


class CorruptBlockError(DataError):
    """A record batch is damaged or not what the manifest says; the rest of the dataset may be sound.

    `file` is its shard, `batch` its number there, `block` its number in the dataset.
    """

    def __init__(self, file: str, batch: int, block: int, reason: str) -> None:
        super().__init__(f"{file}: record batch {batch} {reason}; {REMEDY}")
        self.file = file
        self.batch = batch
        self.block = block
        self.reason = reason


class Dataset:
    """A dataset, opened by its manifest alone and read as one long stream of tokens.

    The stream is every document in stored order. A record batch is called a block. Shards are mapped
    (fetched and unpacked into `cache` first, if need be) when first touched, each block is checked
    (CRC, Arrow's own validation, counts, offsets, token range) when first opened, and only a bounded
    number of either stays open. Several threads may read at once.

    Raises:  DataError if the folder, the manifest or the tokenizer is missing, damaged or at odds
    """

    def __init__(self, path: str | Path, *, cache: ShardCache | None = None) -> None:
        self.path: str | Path = str(path) if is_remote(path) else Path(path)
        self._folder = open_folder(path)
        if isinstance(self._folder, LocalFolder):
            _check_folder(self._folder.path)
        self.manifest = load_manifest(self._folder)
        self._check_tokenizer()
        shards = self.manifest.shards
        table = np.concatenate([shard.batches for shard in shards])
        self.block_ends: NDArray[np.int64] = np.cumsum(table[:, TOKENS])
        self.block_ends.setflags(write=False)
        # Lists because bisect on a list is several times faster than numpy on one number.
        self._ends: list[int] = self.block_ends.tolist()
        self._first_blocks: list[int] = np.cumsum([0, *(len(shard.batches) for shard in shards)]).tolist()
        self.num_blocks = len(self._ends)
        self.total_tokens = self._ends[-1]
        self.num_documents = self.manifest.documents
        self._schema = shard_schema(self.manifest.dtype, self.manifest.has_loss_mask)
        self._maps = ShardMaps(self._folder, self.manifest, cache, weakref.WeakMethod(self._close_shard))
        self._renewed: set[int] = set()
        self._checked = bytearray(self.num_blocks)
        self._open: OrderedDict[int, tuple[Block, int]] = OrderedDict()
        self._open_bytes = 0
        self._mapped_bytes = 0
        self._lock = threading.Lock()

    def check_files(self) -> None:
        """Look at every shard's size, on a file system of this machine; elsewhere that would cost a request
        each, and a shard is looked at when it is fetched.

        Raises:  DataError if one is missing, not a regular file, or of another size
        """
        if isinstance(self._folder, LocalFolder):
            for shard in self.manifest.shards:
                self._folder.check(shard.file, shard.bytes)

    @property
    def tokenizer(self) -> TokenizerInfo:
        """Kind, fingerprint, vocabulary size and eos id of the tokenizer the ids come from."""
        return self.manifest.tokenizer

    @property
    def vocab_size(self) -> int:
        """Every stored token is below this."""
        return self.manifest.tokenizer.vocab_size

    def block(self, number: int) -> Block:
        """Block `number` of [0, num_blocks): tokens [block_ends[number − 1], block_ends[number]).

        Raises:  IndexError outside the range; CorruptBlockError if it is damaged, every time it is asked for;
                 DataError if its shard is missing, of another size or out of reach
        """
        try:  # the usual case, in well under a microsecond
            found = self._open[number]
            self._open.move_to_end(number)
            return found[0]
        except KeyError:
            pass
        if not 0 <= number < self.num_blocks:
            raise IndexError(f"block {number} of {self.num_blocks} in {self.path}")
        block = self._open_block(number)
        self._keep(number, block)
        return block

    def read(self, start: int, stop: int) -> Span:
        """Tokens [start, stop) of the stream; a read-only view of the file where that is possible.

        Raises:  IndexError outside 0 ≤ start ≤ stop ≤ total_tokens; as `block` does
        """
        number = bisect_right(self._ends, start)
        if 0 <= start < stop <= self.total_tokens and stop <= (end := self._ends[number]):
            block = self.block(number)
            begin = end - block.tokens.size
            return block.span(start - begin, stop - begin)
        if not 0 <= start <= stop <= self.total_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.total_tokens} in {self.path}")
        parts, position = [], start
        while position < stop:
            block, end = self.block(number), self._ends[number]
            begin = end - block.tokens.size
            tokens, boundaries, mask = block.span(position - begin, min(stop, end) - begin)
            parts.append(Span(tokens, boundaries + (position - start), mask))
            number, position = number + 1, end
        return self._joined(parts)

    def documents(self) -> Iterator[Document]:
        """Every document in stored order.

        Raises:  as `block` does
        """
        for number in range(self.num_blocks):
            block = self.block(number)
            places = zip(block.places[:-1], block.places[1:], strict=True)
            for doc_id, source, (start, stop) in zip(block.doc_ids, block.sources, places, strict=True):
                mask = None if block.loss_mask is None else block.loss_mask[start:stop]
                yield Document(doc_id, source, block.tokens[start:stop], mask)

    def prefetch(self, blocks: Iterable[int]) -> None:
        """Begin to read these blocks and return at once: from disk, or their shards over the network.

        A hint: of many shards only the last few are fetched, and errors are left to `block`.
        """
        wanted: dict[int, list[tuple[int, int]]] = {}
        for number in blocks:
            shard, row = self.place(number)
            start, size = self.manifest.shards[shard].batches[row, [OFFSET, BYTES]].tolist()
            wanted.setdefault(shard, []).append((start, start + size))
        for shard, ranges in wanted.items():
            self._maps.prefetch(shard, ranges)

    def file_chunks(self, shard: int) -> Iterator[Any]:
        """The bytes of a shard's file as stored, in chunks, unchecked.

        Raises:  DataError if it is missing, of another size or out of reach
        """
        info = self.manifest.shards[shard]
        if self.manifest.compression == "zstd-shard":
            yield from self._folder.stream(info.file, info.bytes)
            return
        data = memoryview(self._maps.map(shard))
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]

    def place(self, number: int) -> tuple[int, int]:
        """Shard of a block, and its record batch there."""
        shard = bisect_right(self._first_blocks, number) - 1
        return shard, number - self._first_blocks[shard]

    def _joined(self, parts: list[Span]) -> Span:
        """One span of several neighbours, or of none."""
        tokens = [np.empty(0, dtype=self.manifest.dtype), *(part.tokens for part in parts)]
        boundaries = [_NO_BOUNDARIES, *(part.boundaries for part in parts)]
        mask = None
        if self.manifest.has_loss_mask:
            masks = [part.loss_mask for part in parts if part.loss_mask is not None]
            mask = np.concatenate([np.empty(0, dtype=np.bool_), *masks])
        return Span(np.concatenate(tokens), np.concatenate(boundaries), mask)

    def _check_tokenizer(self) -> None:
        content = self._folder.read(TOKENIZER_FILE, MAX_TOKENIZER_BYTES)
        found = fingerprint(content, self.tokenizer.eos_id)
        if found != self.tokenizer.fingerprint:
            raise DataError(
                f"{self._folder.locate(TOKENIZER_FILE)} is not the tokenizer of this dataset: fingerprint "
                f"{found[:16]}…, the manifest says {self.tokenizer.fingerprint[:16]}…; {REMEDY}"
            )

    def _keep(self, number: int, block: Block) -> None:
        """Remember an opened block, and forget the least recently used beyond the bounds."""
        size = 0 if block.loss_mask is None else block.loss_mask.nbytes
        if self.manifest.compression in ("lz4", "zstd"):
            size += block.tokens.nbytes + block.offsets.nbytes
        with self._lock:
            self._forget(number)
            self._open[number] = block, size
            self._open_bytes += size
            while len(self._open) > 1 and (
                len(self._open) > OPEN_BLOCKS or self._open_bytes > OPEN_BLOCKS_BYTES
            ):
                self._forget(next(iter(self._open)))

    def _forget(self, number: int) -> None:
        _, size = self._open.pop(number, (None, 0))
        self._open_bytes -= size

    def _close_shard(self, shard: int) -> None:
        """Drop what points into a shard that is let go of."""
        blocks = range(self._first_blocks[shard], self._first_blocks[shard + 1])
        with self._lock:
            for number in [number for number in self._open if number in blocks]:
                self._forget(number)

    def _open_block(self, number: int) -> Block:
        shard, row = self.place(number)
        info = self.manifest.shards[shard]
        offset, size, crc, documents, tokens = info.batches[row].tolist()

        folder = self._folder  # blocks outlive this call, and must not keep the dataset

        def corrupt(reason: str) -> CorruptBlockError:
            return CorruptBlockError(folder.locate(info.file), row, number, reason)

        try:
            data = self._maps.map(shard).slice(offset, size)
            # A copy may have gone and come back with other bytes, so it is checked every time.
            is_checked = bool(self._checked[number]) and not self._maps.are_copies
            found = crc if is_checked else zlib.crc32(data)
            if found != crc and self._renew(shard):
                data = self._maps.map(shard).slice(offset, size)
                found = zlib.crc32(data)
        except CorruptShardError as error:
            raise corrupt(f"cannot be read: {error}") from None
        if found != crc:
            raise corrupt(f"is corrupt: CRC {found:#010x}, expected {crc:#010x}")

        def refusal(error: Exception) -> CorruptBlockError:
            reason = str(error).partition("\n")[0] or type(error).__name__
            return corrupt(f"is not what the manifest says: {reason}")

        try:
            parts = decode(data, self._schema, self.manifest, documents, tokens, is_checked)
        except REFUSALS as error:
            raise refusal(error) from None
        self._checked[number] = 1
        self._touch(size)
        return Block(parts, refusal)

    def _touch(self, size: int) -> None:
        """Bound resident memory, in which mapped pages count though the kernel could have them back. What is
        unpacked or forgotten is not looked at again; what is still read comes back by a page fault."""
        with self._lock:
            self._mapped_bytes += size
            if is_due := self._mapped_bytes > MAPPED_BYTES:
                self._mapped_bytes = 0
        if is_due:
            self._maps.release()

    def _renew(self, shard: int) -> bool:
        """Make a damaged copy of a shard anew, once: the cache's disk may be to blame, not the dataset."""
        if not self._maps.are_copies or shard in self._renewed:
            return False
        self._renewed.add(shard)
        self._maps.renew(shard)
        return True


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        place = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise DataError(f"no dataset folder {path}{place}; make one with: megalite data tokenize --to …")
    if not (path / MANIFEST_FILE).exists():
        inside = [child.name for child in (path / "train", path / "valid") if child.is_dir()]
        hint = f"did you mean {path / inside[0]}?" if inside else "it is not a finished dataset"
        raise DataError(f"{path} holds no {MANIFEST_FILE}; {hint}")
