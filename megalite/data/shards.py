"""The shard format: documents of token ids in Arrow files, written once, read by memory map.

A dataset is a folder:

    manifest.json                            counts, offsets and CRCs of everything below
    tokenizer.json [tokenizer_config.json]   what the ids mean
    shard_00000.arrow …                      Arrow IPC files, documents in stored order

A record batch has the columns `tokens: list<uint16 | uint32>`, `doc_id: string`, `source: string`;
one row is one document, its end-of-document token included. Any Arrow reader opens the files; this
one goes straight to a batch by its manifest offset and trusts a byte only after the batch's CRC.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megalite.data.ipc import check_declared_size, shard_schema
from megalite.data.manifest import (
    BYTES,
    CRC32,
    DOCUMENTS,
    OFFSET,
    TOKENS,
    TokenizerInfo,
    data_file,
    load_manifest,
)
from megalite.data.tokenizer import CONFIG_FILE, MAX_TOKENIZER_BYTES, TOKENIZER_FILE, fingerprint
from megalite.errors import DataError

OPEN_SHARDS = 64
OPEN_VIEWS = 256  # uncompressed batches: a few hundred bytes each, they point into the map
OPEN_DECODED = 128  # compressed batches: 256–512 KiB each

_REMEDY = "restore the file or rebuild the dataset"


class Document(NamedTuple):
    """One stored document: tokens uint16|uint32 [tokens], read-only, its eos included."""

    doc_id: str
    source: str
    tokens: NDArray[Any]


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

    __slots__ = ("_names", "loss_mask", "offsets", "tokens")

    def __init__(
        self,
        tokens: NDArray[Any],
        offsets: NDArray[np.int32],
        loss_mask: NDArray[np.bool_] | None,
        names: pa.RecordBatch,
    ) -> None:
        self.tokens = tokens
        self.offsets = offsets
        self.loss_mask = loss_mask
        self._names = names

    @property
    def doc_ids(self) -> list[str]:
        """The documents' names, made into strings when asked for."""
        names: list[str] = self._names.column("doc_id").to_pylist()
        return names

    @property
    def sources(self) -> list[str]:
        """The documents' sources, made into strings when asked for."""
        names: list[str] = self._names.column("source").to_pylist()
        return names


class CorruptBlockError(DataError):
    """A record batch is damaged or not what the manifest says; the rest of the dataset may be sound.

    `file` is its shard, `batch` its number there, `block` its number in the dataset.
    """

    def __init__(self, file: str, batch: int, block: int, reason: str) -> None:
        super().__init__(f"{file}: record batch {batch} {reason}; {_REMEDY}")
        self.file = file
        self.batch = batch
        self.block = block
        self.reason = reason


class Dataset:
    """A dataset folder, opened by its manifest alone and read as one long stream of tokens.

    The stream is every document in stored order. Shards are mapped when first touched, each record
    batch is checked (CRC, Arrow's own validation, counts, token range) when first opened, and only
    a bounded number of either stays open.

    Raises:  DataError if the folder, a file or the manifest is missing, truncated or at odds
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = load_manifest(self.path)
        self._schema = shard_schema(self.manifest.dtype)
        for shard in self.manifest.shards:
            file, size = data_file(self.path, shard.file)
            if size != shard.bytes:
                raise DataError(f"{file} has {size} bytes, expected {shard.bytes}; {_REMEDY}")
        self._check_tokenizer()
        shards = self.manifest.shards
        tokens = np.concatenate([shard.batches[:, TOKENS] for shard in shards])
        self.block_ends: NDArray[np.int64] = np.cumsum(tokens)
        self.block_ends.setflags(write=False)
        # A list because bisect on a list is several times faster than numpy on one number.
        self._ends: list[int] = self.block_ends.tolist()
        self._place = [(s, b) for s, shard in enumerate(shards) for b in range(len(shard.batches))]
        self._verified = bytearray(len(self._place))
        self.num_blocks = len(self._ends)
        self.total_tokens = self._ends[-1]
        self.num_documents = self.manifest.documents
        self._map = lru_cache(OPEN_SHARDS)(self._map_shard)
        views = OPEN_VIEWS if self.manifest.compression is None else OPEN_DECODED
        self._block = lru_cache(views)(self._open_block)

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
                 DataError if its shard is missing or has another size
        """
        if not 0 <= number < self.num_blocks:
            raise IndexError(f"block {number} of {self.num_blocks} in {self.path}")
        return self._block(number)

    def read(self, start: int, stop: int) -> Span:
        """Tokens [start, stop) of the stream; a read-only view of the file where that is possible.

        Raises:  IndexError outside 0 ≤ start ≤ stop ≤ total_tokens; as `block` does
        """
        if not 0 <= start <= stop <= self.total_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.total_tokens} in {self.path}")
        parts = []
        number, position = bisect_right(self._ends, start), start
        while position < stop:
            block = self._block(number)
            end = self._ends[number]
            begin = end - block.tokens.size
            low, high = position - begin, min(stop, end) - begin
            # Keys of the array's own type: any other makes numpy convert the whole array first.
            first, last = block.offsets[:-1].searchsorted(np.array((low, high), dtype=np.int32))
            boundaries = block.offsets[first:last].astype(np.int64) + (begin - start)
            mask = None if block.loss_mask is None else block.loss_mask[low:high]
            parts.append(Span(block.tokens[low:high], boundaries, mask))
            number, position = number + 1, end
        return parts[0] if len(parts) == 1 else self._joined(parts)

    def documents(self) -> Iterator[Document]:
        """Every document in stored order.

        Raises:  as `block` does
        """
        for number in range(self.num_blocks):
            block = self._block(number)
            for n, (doc_id, source) in enumerate(zip(block.doc_ids, block.sources, strict=True)):
                yield Document(doc_id, source, block.tokens[block.offsets[n] : block.offsets[n + 1]])

    def _joined(self, parts: list[Span]) -> Span:
        """One span of several neighbours, or of none."""
        tokens = [np.empty(0, dtype=self.manifest.dtype), *(part.tokens for part in parts)]
        boundaries = [np.empty(0, dtype=np.int64), *(part.boundaries for part in parts)]
        masks = [part.loss_mask for part in parts if part.loss_mask is not None]
        return Span(
            np.concatenate(tokens), np.concatenate(boundaries), np.concatenate(masks) if masks else None
        )

    def _check_tokenizer(self) -> None:
        path, size = data_file(self.path, TOKENIZER_FILE)
        if size > MAX_TOKENIZER_BYTES:
            raise DataError(f"{path} has {size} bytes; a tokenizer has at most {MAX_TOKENIZER_BYTES}")
        found = fingerprint(path.read_bytes(), self.tokenizer.eos_id)
        if found != self.tokenizer.fingerprint:
            raise DataError(
                f"{path} is not the tokenizer of this dataset: fingerprint {found[:16]}…, the manifest says "
                f"{self.tokenizer.fingerprint[:16]}…; {_REMEDY}"
            )
        if (self.path / CONFIG_FILE).exists():
            data_file(self.path, CONFIG_FILE)

    def _map_shard(self, number: int) -> pa.Buffer:
        shard = self.manifest.shards[number]
        path, _ = data_file(self.path, shard.file)
        with disk_errors(path, "read"), pa.memory_map(str(path)) as file:
            buffer = file.read_buffer()
        if buffer.size != shard.bytes:
            raise DataError(f"{path} has {buffer.size} bytes, expected {shard.bytes}; {_REMEDY}")
        return buffer

    def _open_block(self, number: int) -> Block:
        shard_number, row_number = self._place[number]
        shard = self.manifest.shards[shard_number]
        row = [int(value) for value in shard.batches[row_number]]
        message = self._map(shard_number).slice(row[OFFSET], row[BYTES])
        first = not self._verified[number]

        def corrupt(reason: str) -> CorruptBlockError:
            return CorruptBlockError(str(self.path / shard.file), row_number, number, reason)

        if first and (crc := zlib.crc32(message)) != row[CRC32]:
            raise corrupt(f"is corrupt: CRC {crc:#010x}, expected {row[CRC32]:#010x}")
        try:
            block = self._decode(message, row, first)
        except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
            reason = str(error).partition("\n")[0]
            raise corrupt(f"is not what the manifest says: {reason}") from None
        self._verified[number] = 1
        return block

    def _decode(self, data: pa.Buffer, row: list[int], first: bool) -> Block:
        """Arrow bytes to arrays. A matching CRC proves they arrived, not that they are harmless."""
        message = pa.ipc.read_message(data)
        if message.type != "record batch":
            raise ValueError(f"a {message.type} message")
        check_declared_size(message, self.manifest, row[DOCUMENTS], row[TOKENS])
        batch = pa.ipc.read_record_batch(message, self._schema)
        if first:
            batch.validate(full=True)
        lists = batch.column("tokens")
        values = lists.values
        if lists.offset or batch.num_rows != row[DOCUMENTS] or len(values) != row[TOKENS]:
            raise ValueError(
                f"{batch.num_rows} documents, {len(values)} tokens, not {row[DOCUMENTS]}, {row[TOKENS]}"
            )
        if values.null_count or any(column.null_count for column in batch.columns):
            raise ValueError("nulls")
        offsets = np.frombuffer(lists.buffers()[1], dtype=np.int32, count=batch.num_rows + 1)
        tokens = values.to_numpy(zero_copy_only=True)
        if first:
            if offsets[0] != 0 or offsets[-1] != tokens.size or (np.diff(offsets) < 1).any():
                raise ValueError("document offsets that do not cover its tokens")
            if int(tokens.max()) >= self.vocab_size:
                raise ValueError(f"token {int(tokens.max())} beyond vocab_size={self.vocab_size}")
        return Block(tokens, offsets, None, batch)


def verify(path: str | Path, progress: Callable[[int, int], None] | None = None) -> Dataset:
    """Check every byte of a dataset: each file's CRC, then every record batch. Returns it opened.

    `progress(done, total)` is called with bytes as the check goes on.

    Raises:  DataError naming the first file or batch that is wrong
    """
    dataset = Dataset(path)
    total, done, number = sum(shard.bytes for shard in dataset.manifest.shards), 0, 0
    for shard in dataset.manifest.shards:
        file, crc = dataset.path / shard.file, 0
        with disk_errors(file, "read"), file.open("rb") as stream:
            while block := stream.read(8 << 20):
                crc = zlib.crc32(block, crc)
                done += len(block)
                if progress is not None:
                    progress(done, total)
        for batch in range(number, number + len(shard.batches)):
            dataset._open_block(batch)
        number += len(shard.batches)
        if crc != shard.crc32:  # after the batches, whose errors say more
            raise DataError(f"{file} is corrupt: CRC {crc:#010x}, expected {shard.crc32:#010x}; {_REMEDY}")
    return dataset


@contextmanager
def disk_errors(path: Path, action: str = "write") -> Iterator[None]:
    """Turn an operating system's refusal into the one line a user needs."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot {action} {path}: {reason}; check space and permissions") from None
