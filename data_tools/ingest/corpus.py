"""Text documents as a stream, for what reads a corpus without making parts of it first.

A corpus is read in the same order every time, exact duplicates left out. Whatever is left out is counted
by reason: nothing disappears silently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_tools.ingest.found import Document, Reason, SetAside
from data_tools.ingest.plan import Listing, Piece, check, is_path, list_source
from data_tools.ingest.readers import read_piece
from data_tools.ingest.settings import SourceSettings, source_at
from data_tools.ingest.stdlib import STDLIB
from data_tools.ingest.unpack import STEP_BYTES
from megalite.errors import DataError

ACCEPTED = (
    "text files, .jsonl with a text field, .parquet, .html or .warc (also .gz and .zst), folders of them, "
    f"hf:NAME, or {STDLIB}"
)
WHOLE_FILE_BYTES = 16 << 20  # a larger text file is a corpus and is cut into pieces
PIECE_BYTES = 64 << 10
MAX_DOCUMENT_BYTES = 256 << 20  # of a line after decompression

_COUNTED_AS = {
    Reason.EMPTY: "empty",
    Reason.MALFORMED: "malformed",
    Reason.NO_TEXT_FIELD: "malformed",
    Reason.SURROGATE: "malformed",
    Reason.BROKEN_RECORD: "malformed",
    Reason.BROKEN_PAGE: "malformed",
    Reason.TOO_DEEP: "malformed",
    Reason.NOTHING_EXTRACTED: "empty",
    Reason.BINARY: "not_text",
    Reason.NOT_UTF8: "not_text",
    Reason.PACKED: "not_text",
    Reason.LINK: "links",
    Reason.FOLDER_LINK: "links",
}


class TextDocument(NamedTuple):
    """One document of text; `doc_id` is stable between runs and free of machine paths."""

    doc_id: str
    source: str
    text: str


@dataclass
class Counts:
    """What came in and what was left out, by reason."""

    documents: int = 0
    text_bytes: int = 0
    duplicates: int = 0
    empty: int = 0
    not_text: int = 0  # files and lines that are binary or not UTF-8
    malformed: int = 0  # lines without a usable text field, pages and records that cannot be read
    links: int = 0  # out of the folder, or to folders

    def summary(self) -> str:
        """One line for people."""
        left_out = {
            "duplicate": self.duplicates,
            "empty": self.empty,
            "not UTF-8 text": self.not_text,
            "malformed": self.malformed,
            "behind links": self.links,
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
            if is_path(place) and not Path(place).exists():
                raise DataError(f"no text at {place}; give {ACCEPTED}")
        self.sources = [
            source_at(place, _name(place), max_document_bytes=MAX_DOCUMENT_BYTES) for place in self.places
        ]
        self._listings: list[Listing] = []

    def __iter__(self) -> Iterator[TextDocument]:
        self.counts = counts = Counts()
        seen: set[bytes] = set()
        for source, listing in zip(self.sources, self._listed(), strict=True):
            before = counts.documents + counts.duplicates
            for piece in listing.pieces:
                for document in _documents(piece, source, counts):
                    digest = hashlib.blake2b(document.text, digest_size=16).digest()
                    if digest in seen:
                        counts.duplicates += 1
                        continue
                    seen.add(digest)
                    counts.documents += 1
                    counts.text_bytes += len(document.text)
                    yield TextDocument(document.doc_id, source.name, document.text.decode())
                    if self._max_bytes is not None and counts.text_bytes >= self._max_bytes:
                        return
            if counts.documents + counts.duplicates == before:
                raise DataError(f"no text found in {source.path} ({counts.summary()}); give {ACCEPTED}")

    def estimate_bytes(self) -> int:
        """About how much text there is, from file sizes; 0 when compression hides it."""
        pieces = [piece for listing in self._listed() for piece in listing.pieces]
        if any(piece.name.lower().endswith((*STEP_BYTES, ".parquet")) for piece in pieces):
            return 0
        total = sum(piece.size for piece in pieces)
        return min(total, self._max_bytes) if self._max_bytes is not None else total

    def fingerprints(self) -> list[str]:
        """Of each place, what changes when a file there does, comes or goes."""
        return [
            listing.fingerprint(source) for source, listing in zip(self.sources, self._listed(), strict=True)
        ]

    def _listed(self) -> list[Listing]:
        """The places' files, looked for once."""
        if not self._listings:
            listings = [list_source(source) for source in self.sources]
            for source, listing in zip(self.sources, listings, strict=True):
                if listing.pieces:
                    check(source, listing)
            self._listings = listings
        return self._listings


def _name(place: str) -> str:
    return Path(place).resolve().name if is_path(place) else place


def _documents(piece: Piece, source: SourceSettings, counts: Counts) -> Iterator[Document]:
    """A file's documents; a text file that is a corpus by itself is cut.

    Raises:  DataError if it breaks off: half a corpus is not what was asked for
    """
    if piece.kind == "text" and (piece.path == Path(source.path) or piece.size > WHOLE_FILE_BYTES):
        # Enough pieces that some can be held out, few enough that most end where a thought does.
        piece_bytes = min(PIECE_BYTES, max(2048, piece.size // 100))
        source = source.model_copy(update={"piece_bytes": piece_bytes})
    for found in read_piece(piece, source):
        if isinstance(found, Document):
            yield found
        elif isinstance(found, SetAside):
            _leave_out(piece, found, counts)


def _leave_out(piece: Piece, found: SetAside, counts: Counts) -> None:
    if found.reason in _COUNTED_AS:
        name = _COUNTED_AS[found.reason]
        setattr(counts, name, getattr(counts, name) + 1)
        return
    what = {
        Reason.BREAKS_OFF: f"cannot read {piece.path} to its end: {found.why}; is it complete?",
        Reason.STOPS: f"{piece.path} stops being UTF-8 text at {found.place} ({found.why}); repair it",
        Reason.TOO_LONG: f"{found.place} is longer than {MAX_DOCUMENT_BYTES} bytes; split it",
    }
    raise DataError(what.get(found.reason, f"cannot read {piece.path}: {found.reason}: {found.why}"))
