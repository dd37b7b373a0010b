"""From the places that sources name to tasks: which files, in which order, how large, read as what.

Every rank makes the same plan: names are sorted bytes, sizes decide the rest.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from data_tools.ingest.found import Reason, display_name
from data_tools.ingest.html import check_extractor, extractor_version
from data_tools.ingest.hub import PREFIX, hub_files
from data_tools.ingest.settings import SourceSettings
from data_tools.ingest.stdlib import STDLIB, TOPICS, stdlib_files
from data_tools.ingest.tables import TABLES, check_table
from data_tools.ingest.text import VENDORED, language_of
from data_tools.ingest.unpack import STEP_BYTES
from megalite.errors import DataError

RANGE_BYTES = 256 << 20  # a larger file of JSON lines is read in ranges
GROUP_BYTES = 64 << 20  # smaller files are read together
GROUP_FILES = 4096
SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "table": TABLES,
    "html": (".html", ".htm", ".xhtml"),
    "warc": (".warc", ".wet"),
}
WRITTEN = (".parquet", ".arrow", ".json", ".jsonl", ".html", ".toml", "")  # how what steps write is named
_HINTS = {
    Reason.LINK: "; to read the files that links name, set follow_links = true",
    Reason.FOLDER_LINK: "; links to folders are not followed: name each folder as a source of its own",
}
ARCHIVES = (".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".lz4", ".br")


class Piece(NamedTuple):
    """A file, or a range of its bytes, and what reads it; `kind` "" is a file that `reason` sets aside."""

    path: Path
    name: str  # below the source's path, valid UTF-8
    kind: str
    size: int = 0
    mtime_ns: int = 0
    start: int = 0
    end: int | None = None
    reason: Reason | None = None
    why: str = ""


@dataclass
class Listing:
    """A source's files in order, how many were passed over, by kind, and the revision of a hub's dataset."""

    pieces: list[Piece] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    revision: str = ""

    def fingerprint(self, source: SourceSettings) -> str:
        """What changes when a file does, comes or goes, or what reads pages; free of machine paths."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(f"{piece.name}\0{piece.size}\0{piece.mtime_ns}\0{piece.reason}\n".encode())
        size = sum(piece.size for piece in self.pieces)
        made_with = f", {extractor_version(source)}" if self.has_pages else ""
        told = f"{len(self.pieces)} files, {size} bytes, sha256 {digest.hexdigest()[:32]}"
        revision = f", revision {self.revision}" if self.revision else ""
        return f"{source.name}: {told}{revision}{made_with}"

    @property
    def has_pages(self) -> bool:
        """Whether there may be web pages among the files."""
        kinds = {piece.kind for piece in self.pieces if ".wet" not in piece.name.lower()}
        return not kinds.isdisjoint(("html", "warc"))


def is_path(place: str) -> bool:
    """Whether a source is a file or folder here, not python-stdlib or a dataset of the hub."""
    return place != STDLIB and not place.startswith(PREFIX)


def list_source(source: SourceSettings) -> Listing:
    """The files of a source.

    Raises:  DataError if there is nothing at its path, or what it names cannot be loaded
    """
    if source.path == STDLIB:
        return _list_stdlib()
    if source.path.startswith(PREFIX):
        files, revision = hub_files(source)
        pieces = [Piece(path, name, "table", path.stat().st_size) for path, name in files]
        return Listing(pieces, revision=revision)
    root = Path(source.path)
    if not root.exists():
        raise DataError(f"source {source.name!r}: nothing at {source.path}")
    if root.is_file():
        piece = _piece(root, root.name, source, root.resolve().parent)
        if piece is not None and piece.reason is Reason.PACKED:
            raise DataError(f"source {source.name!r}: {root} is an archive; unpack it and name the folder")
        return Listing([piece or Piece(root, root.name, "code", root.stat().st_size)])
    listing = Listing()
    boundary = root.resolve()
    found = sorted(_walk(root, source, listing), key=lambda path: os.fsencode(path.relative_to(root)))
    for path in found:
        name = display_name(path.relative_to(root).as_posix())
        if not _is_wanted(name, source):
            listing.passed_over["files left out by include or exclude"] += 1
        elif (piece := _piece(path, name, source, boundary)) is None:
            listing.passed_over["files that are not source code"] += 1
        else:
            listing.pieces.append(piece)
    return listing


def check(source: SourceSettings, listing: Listing) -> None:
    """What can be known before work starts.

    Raises:  DataError if a package is missing, a table has not the columns, or there is no file at all
    """
    if not any(piece.kind for piece in listing.pieces):
        reasons = Counter(str(piece.reason) for piece in listing.pieces) + listing.passed_over
        raise DataError(f"no text in source {source.name!r}: {source.path} {_told(reasons)}")
    for piece in listing.pieces:
        if piece.kind == "table":
            check_table(piece.path, source)
    if listing.has_pages:
        check_extractor(source)


def check_apart(sources: Sequence[SourceSettings], out: Path) -> None:
    """Raises:  DataError if a source holds the folder that is written to: it would be read the next time"""
    written = out.resolve()
    for source in sources:
        root = Path(source.path).resolve()
        if not is_path(source.path) or root not in (written, *written.parents):
            continue
        inside = written.relative_to(root)
        names = [(inside / f"a{suffix}").as_posix() for suffix in WRITTEN]
        is_hidden = any(part.startswith(".") for part in inside.parts)
        if not is_hidden and any(_is_wanted(name, source) for name in names):
            hint = f", or exclude = ['{inside.as_posix()}/*']" if inside.parts else ""
            raise DataError(
                f"source {source.name!r}: {source.path} holds {out}, so that what is written would be read "
                f"the next time; write elsewhere{hint}"
            )


def divide(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Tasks: ranges of large files of JSON lines, other large files alone, small ones together."""
    tasks: list[list[Piece]] = []
    group: list[Piece] = []
    for piece in pieces:
        count = -(-piece.size // RANGE_BYTES)
        if piece.kind == "jsonl" and count > 1 and piece.path.suffix.lower() not in STEP_BYTES:
            bounds = [piece.size * number // count for number in range(count + 1)]
            tasks += [[piece._replace(start=a, end=b)] for a, b in pairwise(bounds)]
        elif piece.size >= GROUP_BYTES:
            tasks.append([piece])
        else:
            if len(group) == GROUP_FILES or sum(small.size for small in group) + piece.size > GROUP_BYTES:
                tasks.append(group)
                group = []
            group.append(piece)
    return [*tasks, group] if group else tasks


def _told(reasons: Counter[str]) -> str:
    if not reasons:
        return "is empty"
    told = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
    hints = [hint for reason, hint in _HINTS.items() if reason in reasons]
    return f"has nothing to read ({told}){''.join(hints)}"


def _list_stdlib() -> Listing:
    pieces = [Piece(Path(), TOPICS, TOPICS)]
    for path, name in stdlib_files():
        about = path.stat()
        pieces.append(Piece(path, name, "stdlib", about.st_size, about.st_mtime_ns))
    return Listing(pieces)


def _walk(root: Path, source: SourceSettings, listing: Listing) -> Iterator[Path]:
    """Everything below a folder that is not a folder, but for hidden and, in code trees, vendored ones."""

    def note(error: OSError) -> None:
        path = Path(error.filename)
        name = display_name(path.relative_to(root).as_posix())
        why = error.strerror or ""
        listing.pieces.append(Piece(path, name, "", reason=Reason.UNREADABLE, why=why))

    for folder, subfolders, files in os.walk(root, onerror=note):
        kept = [name for name in subfolders if not name.startswith(".")]
        listing.passed_over["hidden folders"] += len(subfolders) - len(kept)
        if source.format == "code":
            listing.passed_over["folders of others' code"] += sum(name in VENDORED for name in kept)
            kept = [name for name in kept if name not in VENDORED]
        subfolders[:] = kept
        yield from (Path(folder, name) for name in kept if os.path.islink(os.path.join(folder, name)))
        for name in files:
            if name.startswith("."):
                listing.passed_over["hidden files"] += 1
            else:
                yield Path(folder, name)


def _is_wanted(name: str, source: SourceSettings) -> bool:
    if source.include and not any(fnmatchcase(name, pattern) for pattern in source.include):
        return False
    return not any(fnmatchcase(name, pattern) for pattern in source.exclude)


def _piece(path: Path, name: str, source: SourceSettings, boundary: Path) -> Piece | None:
    """What reads a file, None if a code tree's source leaves it out."""
    try:
        about = path.stat()
        target = path.resolve() if path.is_symlink() else None
    except (OSError, RuntimeError) as error:  # a loop of links
        why = getattr(error, "strerror", None) or str(error)
        return Piece(path, name, "", reason=Reason.UNREADABLE, why=why)
    if stat.S_ISDIR(about.st_mode):  # others were walked
        return Piece(
            path, name, "", reason=Reason.FOLDER_LINK, why="not followed; what it names can be a source"
        )
    if target is not None and boundary not in target.parents and not source.follow_links:
        return Piece(path, name, "", reason=Reason.LINK, why="not read without follow_links = true")
    if not stat.S_ISREG(about.st_mode):
        return Piece(path, name, "", reason=Reason.UNREADABLE, why="not a regular file")
    kind = _kind(name, source)
    if kind is None:
        return None
    reason = None if kind else Reason.PACKED
    return Piece(path, name, kind, about.st_size, about.st_mtime_ns, reason=reason)


def _kind(name: str, source: SourceSettings) -> str | None:
    """What reads a file of this name: "" if nothing does, None if it is not wanted."""
    lower = name.lower()
    packing = next((suffix for suffix in STEP_BYTES if lower.endswith(suffix)), "")
    plain = lower.removesuffix(packing)
    if plain.endswith(ARCHIVES):
        return ""
    if source.format == "code":
        return "code" if language_of(plain) else None
    if source.format != "auto":
        return source.format
    kind = next((kind for kind, suffixes in SUFFIXES.items() if plain.endswith(suffixes)), "text")
    return "" if kind == "table" and packing else kind
