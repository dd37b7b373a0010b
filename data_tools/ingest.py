"""Text documents from files, folders, JSON lines, or the Python standard library.

A corpus is read as a stream, in the same order every time, exact duplicates left out. Whatever is
left out is counted by reason: nothing disappears silently.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megalite.errors import DataError

STDLIB = "python-stdlib"
ACCEPTED = f"UTF-8 text files, folders of them, .jsonl/.jsonl.gz/.jsonl.zst with a text field, or {STDLIB}"
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
MAX_LINE_BYTES = 256 << 20  # of JSON after decompression
WHOLE_FILE_BYTES = 16 << 20  # a larger text file is a corpus and is cut into pieces
PIECE_BYTES = 64 << 10

# What is not the library, and tables: megabytes of near-identical lines without language.
_STDLIB_LEFT_OUT = ("site-packages/", "dist-packages/", "pydoc_data/", "encodings/", "lib2to3/tests/data/")
_STDLIB_TESTS = {"test", "tests", "idle_test"}  # their docstrings say little


class TextDocument(NamedTuple):
    """One document of text; `doc_id` is stable between runs and free of machine paths.

    Documents that repeat parts of each other share a `family`, so that none is held out alone.
    """

    doc_id: str
    source: str
    text: str
    family: str | None = None


@dataclass
class Counts:
    """What came in and what was left out, by reason."""

    documents: int = 0
    text_bytes: int = 0
    duplicates: int = 0
    empty: int = 0
    not_text: int = 0  # files that are binary or not UTF-8
    malformed: int = 0  # JSON lines without a usable text field

    def summary(self) -> str:
        """One line for people."""
        left_out = {
            "duplicate": self.duplicates,
            "empty": self.empty,
            "not UTF-8 text": self.not_text,
            "malformed": self.malformed,
        }
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
        return (
            f"{self.documents:,} documents, {self.text_bytes / 1e6:.1f} MB of text"
            f"{f'; left out: {reasons}' if reasons else ''}"
        )


class Corpus:
    """Documents of several places, iterable as often as needed and equal each time.

    `counts` describes the last complete iteration. With `max_bytes` it ends after the document
    that reaches so many bytes of text.

    Raises:  DataError if a place does not exist (at once), holds no text or breaks off (when read)
    """

    def __init__(self, places: Sequence[str | Path], max_bytes: int | None = None) -> None:
        if not places:
            raise DataError(f"no text named; give {ACCEPTED}")
        self.places = [str(place) for place in places]
        self.counts = Counts()
        self._max_bytes = max_bytes
        for place in self.places:
            if place != STDLIB and not Path(place).exists():
                raise DataError(f"no text at {place}; give {ACCEPTED}")

    def __iter__(self) -> Iterator[TextDocument]:
        self.counts = counts = Counts()
        seen: set[bytes] = set()
        for place in self.places:
            before = counts.documents + counts.duplicates
            for document in self._read(place, counts):
                encoded = document.text.encode()
                digest = hashlib.blake2b(encoded, digest_size=16).digest()
                if digest in seen:
                    counts.duplicates += 1
                    continue
                seen.add(digest)
                counts.documents += 1
                counts.text_bytes += len(encoded)
                yield document
                if self._max_bytes is not None and counts.text_bytes >= self._max_bytes:
                    return
            if counts.documents + counts.duplicates == before:
                raise DataError(f"no text found in {place} ({counts.summary()}); give {ACCEPTED}")

    def estimate_bytes(self) -> int:
        """About how much text there is, from file sizes; 0 when compression hides it."""
        total = 0
        for place in self.places:
            files = _stdlib_files() if place == STDLIB else _walk(Path(place))
            for path, name in files:
                if name.endswith((".gz", ".zst")):
                    return 0
                total += path.stat().st_size
        return min(total, self._max_bytes) if self._max_bytes is not None else total

    @staticmethod
    def _read(place: str, counts: Counts) -> Iterator[TextDocument]:
        if place == STDLIB:
            yield from _checked(_read_stdlib(counts), counts)
            return
        root = Path(place)
        source = root.resolve().name
        for path, name in _walk(root):
            if name.endswith(JSONL):
                documents = _read_jsonl(path, name, counts)
            else:
                documents = _read_text(path, name, counts, alone=root.is_file())
            yield from _checked((TextDocument(doc_id, source, text) for doc_id, text in documents), counts)


def _checked(documents: Iterator[TextDocument], counts: Counts) -> Iterator[TextDocument]:
    for document in documents:
        if document.text.strip():
            yield document
        else:
            counts.empty += 1


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Regular files below a folder with their names relative to it, sorted, hidden ones left out."""
    if root.is_file():
        yield root, root.name
        return
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for file in sorted(files):
            path = Path(folder, file)
            if not file.startswith(".") and path.is_file():
                yield path, path.relative_to(root).as_posix()


def _read_text(path: Path, name: str, counts: Counts, alone: bool) -> Iterator[tuple[str, str]]:
    """A text file as one document, or in pieces when it is a corpus by itself."""
    size = path.stat().st_size
    if alone or size > WHOLE_FILE_BYTES:
        # Enough pieces that some can be held out, few enough that most end where a thought does.
        yield from _read_pieces(path, name, counts, min(PIECE_BYTES, max(2048, size // 100)))
        return
    text = _decode(_read_bytes(path))
    if text is None:
        counts.not_text += 1
    else:
        yield name, text


def _read_pieces(path: Path, name: str, counts: Counts, piece_bytes: int) -> Iterator[tuple[str, str]]:
    """Pieces of about `piece_bytes`, each ending at a line's end where there is one near."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while piece := file.read(piece_bytes):
                piece += file.readline(piece_bytes)
                if "\0" in piece:
                    raise ValueError
                yield f"{name}#{number}", piece
                number += 1
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:  # UnicodeDecodeError is one
        if number:
            raise DataError(f"{path} stops being UTF-8 text after {number} pieces; repair it") from None
        counts.not_text += 1


def _read_jsonl(path: Path, name: str, counts: Counts) -> Iterator[tuple[str, str]]:
    """One document a line: its `text`, named by its `id` if that is a string, else by its line."""
    try:
        with _open_lines(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
                if len(line) >= MAX_LINE_BYTES:
                    raise DataError(f"{path}:{number} is longer than {MAX_LINE_BYTES} bytes; split it")
                if not line.strip():
                    continue
                record = _parse(line)
                if record is None:
                    counts.malformed += 1
                    continue
                doc_id = record.get("id")
                yield doc_id if isinstance(doc_id, str) else f"{name}:{number}", record["text"]
    except OSError as error:
        raise DataError(f"cannot read {path} to its end: {error}; is it complete?") from None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            return None
        for key in ("text", "id"):  # JSON can spell half a surrogate pair, UTF-8 cannot
            if isinstance(record.get(key), str):
                record[key].encode()
    except (ValueError, RecursionError):
        return None
    return record


def _open_lines(path: Path) -> io.BufferedReader:
    """Lines of a plain, gzip or zstd file. Arrow's streams, unlike others, notice a truncated end."""
    import pyarrow as pa

    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), 1 << 20)


def _stdlib_files() -> list[tuple[Path, str]]:
    """The standard library's sources, shuffled by name so that any first part of them is varied."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [(path, path.relative_to(root).as_posix()) for path in root.rglob("*.py")]
    varied = [(path, name) for path, name in found if not name.startswith(_STDLIB_LEFT_OUT)]
    return sorted(varied, key=lambda item: hashlib.sha256(item[1].encode()).digest())


def _read_stdlib(counts: Counts) -> Iterator[TextDocument]:
    """Sources, the prose of their docstrings, and the language reference that pydoc carries."""
    for topic, text in sorted(_pydoc_topics().items()):
        yield TextDocument(f"topics/{topic}", STDLIB, text)
    for path, name in _stdlib_files():
        source = _decode(_read_bytes(path))
        if source is None:
            counts.not_text += 1
            continue
        yield TextDocument(name, STDLIB, source)
        if not _STDLIB_TESTS.intersection(name.split("/")) and (prose := _docstrings(source)):
            yield TextDocument(f"{name}#docstrings", STDLIB, prose, family=name)


def _pydoc_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return {}
    return dict(topics)


def _docstrings(source: str) -> str:
    """Every docstring of a module in order, each under the name of what it describes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in old sources are not our business
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return ""
    return "\n\n".join(_named_docstrings(tree, ""))


def _named_docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[str]:
    if prose := ast.get_docstring(node):
        yield f"{name}\n{prose}" if name else prose
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _named_docstrings(child, f"{name}.{child.name}" if name else child.name)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _decode(data: bytes) -> str | None:
    """UTF-8 text without a byte order mark, or None for anything else."""
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
