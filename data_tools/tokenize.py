"""Text documents to token shards: a training dataset and a held-out one, both or neither.

A tokenizer is trained on what is not held out.
"""

from __future__ import annotations

import heapq
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.hold_out import hold_out, place, unigram_entropy
from data_tools.ingest import TextDocument
from data_tools.ingest.stdlib import family_of
from megalite.data.folder import LocalFolder, disk_errors
from megalite.data.manifest import load_manifest
from megalite.data.staging import clear_leftovers, commit_folder
from megalite.data.tokenizer import Tokenizer
from megalite.data.writer import ShardWriter
from megalite.errors import DataError

STATS_FILE = "stats.json"
CHUNK_CHARS = 1 << 20  # of text tokenized at once: enough to keep every core busy
BPE_SAMPLE_CHARS = 4 << 20
BPE_SCAN_CHARS = 1 << 30  # reading more text than this does not make the sample better

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Part:
    """Counts of one dataset."""

    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class BuildStats:
    """What a build made, as kept in stats.json.

    `unigram_entropy` is what the function of that name says; `text` the fingerprints of what was read.
    """

    train: Part
    valid: Part
    vocab_size: int
    bytes_per_token: float
    unigram_entropy: float
    recipe: dict[str, Any]
    text: list[str]

    def summary(self) -> str:
        """A few lines for people."""
        parts = "\n".join(
            f"  {name}: {part.documents:,} documents, {part.tokens:,} tokens, {part.text_bytes / 1e6:.1f} MB"
            for name, part in (("train", self.train), ("valid", self.valid))
        )
        return (
            f"{parts}\n  {self.bytes_per_token:.2f} bytes per token, vocabulary {self.vocab_size:,}\n"
            f"  unigram entropy of the held-out tokens: {self.unigram_entropy:.3f} nats per token"
        )


def build_shards(
    documents: Iterable[TextDocument],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    valid_fraction: float = 0.02,
    compression: str | None = None,
    recipe: dict[str, Any] | None = None,
    text: Sequence[str] = (),
    progress: Progress | None = None,
) -> BuildStats:
    """Write `out/train`, `out/valid` and `out/stats.json`; `out` appears whole or not at all.

    Every document gets the tokenizer's eos at its end. `recipe` is kept in stats.json, for
    `finished_build` to compare, and `text`. `progress(n)` is called with the bytes of text done so far.

    Raises:  DataError if `out` is taken, either dataset would be empty, or the disk refuses
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is already there and not a finished build; remove it or name another folder")
    staging = out.with_name(out.name + ".tmp")
    clear_leftovers(staging)
    tally = {False: _Tally(tokenizer.vocab_size), True: _Tally(tokenizer.vocab_size)}
    try:
        with (
            ShardWriter(staging / "train", tokenizer, compression=compression) as train,
            ShardWriter(staging / "valid", tokenizer, compression=compression) as valid,
        ):
            for document, is_held_out, ids in _encoded(hold_out(documents, valid_fraction), tokenizer):
                tokens = np.append(ids, tokenizer.eos_id)
                writer = valid if is_held_out else train
                writer.write(document.doc_id, document.source, tokens)
                tally[is_held_out].add(document, tokens)
                if progress is not None:
                    progress(sum(part.text_bytes for part in tally.values()))
        stats = _stats(tally[False], tally[True], recipe or {}, list(text))
        with disk_errors(out):
            (staging / STATS_FILE).write_text(json.dumps(asdict(stats), indent=2) + "\n", encoding="utf-8")
            commit_folder(staging, out)
        return stats
    finally:
        clear_leftovers(staging)


def finished_build(out: str | Path, recipe: dict[str, Any]) -> BuildStats | None:
    """The statistics of a build that is already there, None if there is none.

    Raises:  DataError if it was built from another recipe, its stats.json is damaged, or a dataset of it is
    gone or in a format of another version
    """
    path = Path(out) / STATS_FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        train, valid = (Part(**values.pop(name)) for name in ("train", "valid"))
        stats = BuildStats(train, valid, **values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove {out} and build it again") from None
    for key, wanted in recipe.items():
        if stats.recipe.get(key) != wanted:
            raise DataError(
                f"{out} was built with {key}={stats.recipe.get(key)!r}, not {wanted!r}; "
                "name another folder or remove it first"
            )
    for name in ("train", "valid"):
        load_manifest(LocalFolder(Path(out) / name))
    return stats


def sample_texts(documents: Iterable[TextDocument], valid_fraction: float, sample_chars: int) -> list[str]:
    """Texts to train a tokenizer on: a uniform sample of the documents that are not held out.

    The choice is by hash, hence the same every time, and sees at most the first GiB of text.
    """
    chosen: list[tuple[float, int, str]] = []  # a heap with the least wanted on top
    size = scanned = 0
    for number, (document, is_held_out) in enumerate(hold_out(documents, valid_fraction)):
        scanned += len(document.text)
        if scanned > BPE_SCAN_CHARS:
            break
        if is_held_out:
            continue
        heapq.heappush(
            chosen,
            (-place(document.source, family_of(document.doc_id), "sample"), number, document.text),
        )
        size += len(document.text)
        while len(chosen) > 1 and size - len(chosen[0][2]) >= sample_chars:
            size -= len(heapq.heappop(chosen)[2])
    return [text for _, _, text in sorted(chosen, key=lambda item: item[1])]


def _encoded(
    documents: Iterable[tuple[TextDocument, bool]], tokenizer: Tokenizer
) -> Iterator[tuple[TextDocument, bool, NDArray[np.int64]]]:
    """Tokenize in chunks on a thread, while the caller reads the next and writes the last."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[list[tuple[TextDocument, bool]], Future[list[NDArray[np.int64]]]]] = deque()
        for chunk in _chunks(documents):
            texts = [document.text for document, _ in chunk]
            waiting.append((chunk, pool.submit(tokenizer.encode_batch, texts)))
            if len(waiting) > 1:
                yield from _joined(*waiting.popleft())
        for chunk, future in waiting:
            yield from _joined(chunk, future)


def _joined(
    chunk: list[tuple[TextDocument, bool]], future: Future[list[NDArray[np.int64]]]
) -> Iterator[tuple[TextDocument, bool, NDArray[np.int64]]]:
    for (document, is_held_out), ids in zip(chunk, future.result(), strict=True):
        yield document, is_held_out, ids


def _chunks(documents: Iterable[tuple[TextDocument, bool]]) -> Iterator[list[tuple[TextDocument, bool]]]:
    chunk: list[tuple[TextDocument, bool]] = []
    size = 0
    for item in documents:
        chunk.append(item)
        size += len(item[0].text)
        if size >= CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Tally:
    """Running counts of one dataset."""

    def __init__(self, vocab_size: int) -> None:
        self.documents = 0
        self.text_bytes = 0
        self.frequency = np.zeros(vocab_size, dtype=np.int64)

    def add(self, document: TextDocument, tokens: NDArray[np.int64]) -> None:
        self.documents += 1
        self.text_bytes += len(document.text.encode())
        self.frequency += np.bincount(tokens, minlength=self.frequency.size)

    def part(self) -> Part:
        return Part(self.documents, int(self.frequency.sum()), self.text_bytes)


def _stats(train: _Tally, valid: _Tally, recipe: dict[str, Any], text: list[str]) -> BuildStats:
    parts = train.part(), valid.part()
    return BuildStats(
        train=parts[0],
        valid=parts[1],
        vocab_size=train.frequency.size,
        bytes_per_token=sum(part.text_bytes for part in parts) / sum(part.tokens for part in parts),
        unigram_entropy=unigram_entropy(train.frequency, valid.frequency),
        recipe=recipe,
        text=text,
    )
