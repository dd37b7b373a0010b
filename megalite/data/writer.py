"""Write a dataset folder: streaming, in bounded memory, resumable, and either whole or not there."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from megalite.data.folder import LocalFolder, disk_errors
from megalite.data.ipc import shard_schema
from megalite.data.manifest import (
    COMPRESSIONS,
    MAX_NAME_BYTES,
    VERSION,
    Manifest,
    ShardInfo,
    TokenizerInfo,
    load_manifest,
)
from megalite.data.shard_file import ShardFile
from megalite.data.staging import Journal, Progress, check_free, clear_leftovers, commit_dataset
from megalite.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer
from megalite.errors import DataError

SHARD_BYTES = 256 << 20  # of buffers before compression; keeps int32 list offsets safe
# What one CRC covers and one open verifies. The first batch of a run waits for one of them a sample.
BATCH_TOKENS = 1 << 18  # 512 KiB or 1 MiB, a seventh of a millisecond
COMPRESSED_BATCH_TOKENS = 1 << 16  # smaller, because it is unpacked, too
BATCH_DOCUMENTS = 1 << 16
MAX_DOCUMENT_TOKENS = 2**31 - 1


class _Row(NamedTuple):
    """A document on its way into a record batch; bounds uint32 [2 · spans] of what counts for the loss."""

    doc_id: str
    source: str
    tokens: NDArray[Any]
    bounds: NDArray[np.uint32]


class ShardWriter:
    """Write a dataset folder, document by document, in memory bounded by one record batch.

    Everything goes to `<folder>.tmp`; leaving the `with` block without an exception makes it durable
    and renames it to `folder`. Leaving it with one removes it, and the leftovers of a killed writer are
    cleared by the next; with `resume` both keep the finished shards instead, and a writer that is given
    the same documents in the same order continues after them, to the same bytes.

    Raises:  DataError if `folder` is already there, a document does not fit, nothing was written,
             what is to be resumed was written otherwise, or the disk refuses
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        *,
        compression: str | None = None,
        has_loss_mask: bool = False,
        resume: bool = False,
        shard_bytes: int = SHARD_BYTES,
        batch_tokens: int | None = None,
    ) -> None:
        if compression not in COMPRESSIONS:
            raise DataError(
                f'compression={compression!r} is not known; use "lz4", "zstd", "zstd-shard" or none'
            )
        self._folder = Path(folder)
        self._staging = self._folder.with_name(self._folder.name + ".tmp")
        self._tokenizer = tokenizer
        self._resume = resume
        self._shard_bytes = shard_bytes
        is_unpacked_by_batch = compression in ("lz4", "zstd")
        self._batch_tokens = batch_tokens or (
            COMPRESSED_BATCH_TOKENS if is_unpacked_by_batch else BATCH_TOKENS
        )
        info = TokenizerInfo(tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id)
        self._manifest = Manifest(info, compression, (), has_loss_mask)
        self._schema = shard_schema(self._manifest.dtype, has_loss_mask)
        self._journal = Journal(self._staging, self._head())
        self._finished: list[tuple[ShardInfo, Progress]] = []
        self._resumed = Progress(0, 0, "")
        self._shard: ShardFile | None = None
        self._pending: list[_Row] = []
        self._pending_tokens = 0
        self._documents = self._empty = 0
        self._names = hashlib.blake2b(digest_size=16)
        self._before_pending = self._progress()

    def __enter__(self) -> Self:
        check_free(self._folder)
        if self._resume:
            self._finished = self._journal.load()
            self._resumed = self._finished[-1][1] if self._finished else self._resumed
        keep = {shard.file for shard, _ in self._finished}
        clear_leftovers(self._staging, frozenset(keep))
        with disk_errors(self._staging):
            self._staging.mkdir(parents=True, exist_ok=True)
            self._tokenizer.save(self._staging)
            self._journal.begin(self._finished)
        return self

    @property
    def finished_documents(self) -> int:
        """How many documents at the beginning of the input a resumed dataset already holds."""
        return self._resumed.documents

    def write(
        self,
        doc_id: str,
        source: str,
        tokens: NDArray[np.integer[Any]],
        loss_spans: ArrayLike | None = None,
    ) -> None:
        """Append one document: integer tokens [n < 2^31], each in [0, vocab_size), eos included.

        `loss_spans` [spans, 2] are the start and stop of what counts for the loss, in order; without
        them all of it does. A document without tokens is left out and counted. One that a resumed
        dataset already holds is passed over.

        Raises:  DataError naming the document
        """
        row = self._checked(doc_id, source, np.asarray(tokens), loss_spans)
        if self._documents < self.finished_documents:
            self.skip(doc_id, source)
            return
        size = row.tokens.size
        if size and (
            self._pending_tokens + size > self._batch_tokens or len(self._pending) >= BATCH_DOCUMENTS
        ):
            self._flush()
        if size and not self._pending:
            self._before_pending = self._progress()
        self._count(doc_id, source)
        if size:
            self._pending.append(row)
            self._pending_tokens += size
        else:
            self._empty += 1

    def skip(self, doc_id: str, source: str) -> None:
        """Pass over one of the first `finished_documents` without having to make its tokens again.

        Raises:  DataError if the documents passed over are not those that were written
        """
        self._count(doc_id, source)
        if self._documents > self.finished_documents:
            raise DataError(f"document {doc_id!r} is not in {self._staging}; write it instead of skipping it")
        if self._documents == self.finished_documents:
            self._empty = self._resumed.empty
            if self._progress() != self._resumed:
                raise DataError(
                    f"the first {self._documents} documents are not those {self._staging} was made from; "
                    "give the same ones, or remove it to begin anew"
                )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            if self._shard is not None:
                self._shard.abandon()
            if not self._resume:
                shutil.rmtree(self._staging, ignore_errors=True)

    def _head(self) -> dict[str, Any]:
        """What must be equal for a dataset to be continued."""
        return {
            "version": VERSION,
            "tokenizer": self._tokenizer.fingerprint,
            "compression": self._manifest.compression,
            "loss_mask": self._manifest.has_loss_mask,
            "shard_bytes": self._shard_bytes,
            "batch_tokens": self._batch_tokens,
        }

    def _progress(self) -> Progress:
        return Progress(self._documents, self._empty, self._names.hexdigest())

    def _count(self, doc_id: str, source: str) -> None:
        self._documents += 1
        self._names.update(f"{len(doc_id)} {doc_id} {source}\n".encode())

    def _checked(
        self, doc_id: str, source: str, tokens: NDArray[np.integer[Any]], loss_spans: ArrayLike | None
    ) -> _Row:
        if (
            tokens.ndim != 1
            or (tokens.size and tokens.dtype.kind not in "iu")
            or tokens.size > MAX_DOCUMENT_TOKENS
        ):
            raise DataError(
                f"document {doc_id!r}: tokens are {tokens.dtype} {list(tokens.shape)}; expected integers "
                f"[0 … {MAX_DOCUMENT_TOKENS}]"
            )
        vocab_size = self._manifest.tokenizer.vocab_size
        low, high = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise DataError(
                f"document {doc_id!r}: token {wrong} at {int(np.argmax(tokens == wrong))} is not in "
                f"[0, {vocab_size}), the tokenizer's vocabulary"
            )
        if max(len(doc_id.encode()), len(source.encode())) > MAX_NAME_BYTES:
            raise DataError(f"document {doc_id[:40]!r}…: doc_id or source exceeds {MAX_NAME_BYTES} bytes")
        bounds = self._bounds(doc_id, tokens.size, loss_spans)
        return _Row(doc_id, source, tokens.astype(self._manifest.dtype), bounds)

    def _bounds(self, doc_id: str, size: int, loss_spans: ArrayLike | None) -> NDArray[np.uint32]:
        if loss_spans is None:
            return np.array([0, size], dtype=np.uint32)
        if not self._manifest.has_loss_mask:
            raise DataError(f"document {doc_id!r} has loss_spans; open the writer with has_loss_mask=True")
        spans = np.asarray(loss_spans)
        flat = spans.ravel()
        if flat.size and (spans.ndim != 2 or spans.shape[1] != 2 or flat.dtype.kind not in "iu"):
            raise DataError(
                f"document {doc_id!r}: loss_spans are {spans.dtype} {list(spans.shape)}; expected [n, 2]"
            )
        inside = not flat.size or (flat[0] >= 0 and flat[-1] <= size)
        if not inside or (flat[1:] < flat[:-1]).any() or (flat[::2] >= flat[1::2]).any():
            raise DataError(
                f"document {doc_id!r}: loss_spans {spans[:3].tolist()} … are not ascending pairs "
                f"start < stop within its {size} tokens"
            )
        return flat.astype(np.uint32)

    def _flush(self) -> None:
        if not self._pending:
            return
        names, sources, tokens, bounds = zip(*self._pending, strict=True)
        columns = [_lists(self._schema, "tokens", tokens), pa.array(names), pa.array(sources)]
        if self._manifest.has_loss_mask:
            columns.append(_lists(self._schema, "loss_mask", bounds))
        batch = pa.record_batch(columns, schema=self._schema)
        if self._shard is not None and self._shard.arrow_bytes + batch.nbytes > self._shard_bytes:
            self._close_shard(self._before_pending)
        with disk_errors(self._staging):
            if self._shard is None:
                suffix = ".arrow.zst" if self._manifest.compression == "zstd-shard" else ".arrow"
                path = self._staging / f"shard_{len(self._finished):05d}{suffix}"
                self._shard = ShardFile(path, self._schema, self._manifest.compression)
            self._shard.write(batch, self._pending_tokens)
        self._pending, self._pending_tokens = [], 0

    def _close_shard(self, progress: Progress) -> None:
        if self._shard is not None:
            with disk_errors(self._staging):
                self._finished.append((self._shard.close(), progress))
                self._journal.append(*self._finished[-1])
            self._shard = None

    def _commit(self) -> None:
        if self._documents < self.finished_documents:
            raise DataError(
                f"{self._documents} documents were given, but {self._staging} was made from "
                f"{self.finished_documents} or more; give the same ones, or remove it to begin anew"
            )
        self._flush()
        self._close_shard(self._progress())
        if not self._finished:
            raise DataError(f"nothing was written to {self._folder}: no documents; give some text")
        shards = tuple(shard for shard, _ in self._finished)
        manifest = Manifest(
            self._manifest.tokenizer,
            self._manifest.compression,
            shards,
            self._manifest.has_loss_mask,
            self._empty,
        )
        commit_dataset(self._staging, self._folder, manifest)


def join_datasets(parts: Sequence[str | Path], folder: str | Path) -> None:
    """Make one dataset of several on the same file system, in the order given, and remove the parts.

    So several processes write one dataset: each its own part, a fixed share of the documents. No
    token is read or copied; files get new names by hard links. A call that was killed before `folder` was
    there can be repeated.

    Raises:  DataError if `folder` is already there, the parts differ in tokenizer, compression or
             loss mask, or the disk refuses
    """
    folder, paths = Path(folder), [Path(part) for part in parts]
    if not paths:
        raise DataError(f"no parts to join to {folder}; name at least one")
    check_free(folder)
    manifests = [load_manifest(LocalFolder(path)) for path in paths]
    first = manifests[0]
    for path, other in zip(paths, manifests, strict=True):
        for key in ("tokenizer", "compression", "has_loss_mask"):
            if getattr(other, key) != getattr(first, key):
                raise DataError(
                    f"{path} has {key} {getattr(other, key)}, but {paths[0]} has {getattr(first, key)}; "
                    "write all parts in the same way"
                )
    staging = folder.with_name(folder.name + ".tmp")
    clear_leftovers(staging)
    shards: list[ShardInfo] = []
    with disk_errors(staging):
        staging.mkdir(parents=True)
        for name in (TOKENIZER_FILE, CONFIG_FILE):
            if (paths[0] / name).exists():
                shutil.copyfile(paths[0] / name, staging / name, follow_symlinks=False)
        for path, manifest in zip(paths, manifests, strict=True):
            for shard in manifest.shards:
                name = f"shard_{len(shards):05d}{shard.file[shard.file.index('.') :]}"
                os.link(path / shard.file, staging / name, follow_symlinks=False)
                shards.append(ShardInfo(name, shard.bytes, shard.crc32, shard.arrow_bytes, shard.batches))
    empty = sum(manifest.empty_documents for manifest in manifests)
    joined = Manifest(first.tokenizer, first.compression, tuple(shards), first.has_loss_mask, empty)
    commit_dataset(staging, folder, joined)
    with disk_errors(folder):
        for path in paths:
            shutil.rmtree(path)


def _lists(schema: pa.Schema, name: str, rows: Sequence[NDArray[Any]]) -> pa.ListArray:
    """A list column with these rows."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([row.size for row in rows], out=offsets[1:])
    values = pa.array(np.concatenate(rows))
    kind = schema.field(name).type
    return pa.ListArray.from_buffers(kind, len(rows), [None, pa.py_buffer(offsets)], children=[values])
