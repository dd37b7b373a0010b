"""Web archives: the pages of WARC responses and the texts of WET conversions (ISO 28500).

A broken record costs itself: reading goes on at the next line that begins a record, and in a compressed
archive at the next member.
"""

from __future__ import annotations

import codecs
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.ingest.found import HEAD_BYTES, Document, Found, Note, Reason, SetAside
from data_tools.ingest.html import page_document
from data_tools.ingest.settings import SourceSettings
from data_tools.ingest.unpack import BrokenStreamError, ByteStream, buffered

MAX_HEADER_LINE, MAX_HEADER_LINES = 64 << 10, 1000
_BEGIN = b"WARC/"
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
# Python calls by their names what is none; the time of one of them grows with the square of the text.
_NO_CHARSETS = frozenset({"idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape"})
_PAGES = ("text/html", "application/xhtml+xml")
# Those the standard names that hold no text; others are counted together.
_KINDS = frozenset({"warcinfo", "request", "metadata", "revisit", "continuation"})


class Record(NamedTuple):
    """One record: its number from 1, its headers by lower-case name, and its block."""

    number: int
    headers: dict[str, str]
    block: bytes


class _BrokenRecordError(Exception):
    """A record that cannot be what it says; `head` is what was read last of it."""

    def __init__(self, why: str, head: bytes, reason: Reason = Reason.BROKEN_RECORD, size: int = 0) -> None:
        super().__init__(why)
        self.why, self.head, self.reason, self.size = why, head, reason, size


def read_warc(path: Path, name: str, source: SourceSettings) -> Iterator[Found]:
    """The documents of an archive, each named by its record's id, with its address and date in meta."""
    try:
        raw = ByteStream(path)
    except BrokenStreamError as error:
        yield SetAside(name, error.reason, why=error.why)
        return
    with raw:
        number, goes_on = 0, True
        while goes_on:
            stream = buffered(raw)
            try:
                for found in _records(stream, source, number):
                    number = found.number if isinstance(found, Record) else number + 1
                    if isinstance(found, Record):
                        yield from _document(f"{name}:{number}", found, source)
                    else:
                        yield SetAside(f"{name}:{number}", found.reason, found.head, found.size, found.why)
                goes_on = False
            except BrokenStreamError as error:
                number += 1
                yield SetAside(f"{name}:{number}", error.reason, why=error.why)
                goes_on = error.reason is Reason.BREAKS_OFF and raw.skip_member()
            finally:
                stream.detach()


def _records(
    stream: io.BufferedReader, source: SourceSettings, number: int
) -> Iterator[Record | _BrokenRecordError]:
    """Records, and what is broken between them, of which each counts as one."""
    line = stream.readline(MAX_HEADER_LINE)
    while line:
        if not line.strip():
            line = stream.readline(MAX_HEADER_LINE)
            continue
        number += 1
        try:
            yield _record(stream, line, source, number)
            line = stream.readline(MAX_HEADER_LINE)
        except _BrokenRecordError as error:
            yield error
            line = _next_begin(stream)


def _record(stream: io.BufferedReader, line: bytes, source: SourceSettings, number: int) -> Record:
    if not line.startswith(_BEGIN):
        raise _BrokenRecordError("no WARC/ where a record should begin", line)
    first, headers = line, {}
    for _ in range(MAX_HEADER_LINES):
        line = stream.readline(MAX_HEADER_LINE)
        if not line.strip():
            break
        key, colon, value = line.decode("utf-8", "replace").partition(":")
        if not colon or not line.endswith(b"\n"):
            raise _BrokenRecordError("a header line without a colon, or too long", first + line)
        headers[key.strip().lower()] = value.strip()
    if line.strip() or not line:
        raise _BrokenRecordError("it ends within its headers" if not line else "too many headers", first)
    said = headers.get("content-length", "")
    if not (said.isascii() and said.isdigit() and len(said) < 20):
        raise _BrokenRecordError(f"Content-Length is {said[:50]!r}", first)
    length = int(said)
    if length > source.max_document_bytes:
        raise _BrokenRecordError(f"{length} bytes", first, Reason.TOO_LONG, length)
    block = stream.read(length)
    if len(block) < length:
        why = f"it ends after {len(block)} of {length} bytes"
        raise _BrokenRecordError(why, block, Reason.BREAKS_OFF, len(block))
    return Record(number, headers, block)


def _next_begin(stream: io.BufferedReader) -> bytes:
    """The next line that begins a record; empty at the end."""
    at_line_start = True
    while line := stream.readline(MAX_HEADER_LINE):
        if at_line_start and line.startswith(_BEGIN + b"1."):
            return line
        at_line_start = line.endswith(b"\n")
    return b""


def _document(place: str, record: Record, source: SourceSettings) -> Iterator[Found]:
    headers, block = record.headers, record.block
    kind = headers.get("warc-type", "").lower()
    doc_id = headers.get("warc-record-id", "").strip("<>").removeprefix("urn:uuid:") or place
    keys = {"url": "warc-target-uri", "date": "warc-date", "languages": "warc-identified-content-language"}
    meta: dict[str, Any] = {key: headers[name].strip("<>") for key, name in keys.items() if headers.get(name)}
    if kind == "conversion":
        yield _plain(place, doc_id, block, None, meta, source)
        return
    if kind not in ("response", "resource"):
        yield Note(f"WARC records left out: {kind if kind in _KINDS else 'other'}")
        return
    content = headers.get("content-type", "").lower()
    if kind == "response" and content.startswith("application/http"):
        try:
            status, content, block = http_body(block, source.max_document_bytes)
        except ValueError as error:
            yield SetAside(
                place, Reason.BROKEN_RECORD, record.block[:HEAD_BYTES], len(record.block), str(error)
            )
            return
        if status != 200:
            yield Note("WARC responses left out: status other than 200")
            return
    mime, _, rest = content.partition(";")
    charset = match[1] if (match := _CHARSET.search(rest)) else None
    if mime.strip() in _PAGES:
        yield from page_document(place, doc_id, block, charset, meta, source)
    elif mime.strip() == "text/plain":
        yield _plain(place, doc_id, block, charset, meta, source)
    else:
        yield Note("WARC responses left out: neither HTML nor plain text")


def _plain(
    place: str, doc_id: str, block: bytes, charset: str | None, meta: dict[str, Any], source: SourceSettings
) -> Found:
    """Text as the archive gives it; UTF-8 unless something was said."""
    try:
        name = codecs.lookup(charset or "utf-8").name
        if name in _NO_CHARSETS:
            raise LookupError(f"{name} is no character set")
        text = block.decode(name, source.encoding_errors)
    except (UnicodeDecodeError, LookupError) as error:
        return SetAside(place, Reason.NOT_UTF8, block[:HEAD_BYTES], len(block), str(error)[:200])
    if not text or text.isspace():
        return SetAside(place, Reason.EMPTY, block[:HEAD_BYTES], len(block))
    return Document(doc_id, text.encode("utf-8", "replace"), meta or None, len(block))


def http_body(block: bytes, limit: int) -> tuple[int, str, bytes]:
    """Status, content type and body of an HTTP response, its transfer and content encodings undone.

    Raises:  ValueError if it is not one, is damaged, or its body is more than `limit` bytes
    """
    head, separator, body = block.partition(b"\r\n\r\n")
    if not separator:
        head, separator, body = block.partition(b"\n\n")
    rows = head.decode("latin-1").splitlines()
    words = rows[0].split(None, 2) if rows else []
    if len(words) < 2 or not words[0].startswith("HTTP/") or not (words[1].isascii() and words[1].isdigit()):
        raise ValueError("not an HTTP response")
    headers = {
        key.strip().lower(): value.strip() for key, _, value in (row.partition(":") for row in rows[1:])
    }
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = _unchunked(body)
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding in ("gzip", "x-gzip", "deflate"):
        body = _inflated(body, encoding, limit)
    elif encoding not in ("identity", ""):
        raise ValueError(f"content encoding {encoding[:50]!r} is not one that can be undone")
    return int(words[1][:9]), headers.get("content-type", "").lower(), body


def _unchunked(body: bytes) -> bytes:
    """A chunked body joined; one that is not chunked, though it says so, as it is (archives do that)."""
    pieces: list[bytes] = []
    at = 0
    while True:
        end = body.find(b"\r\n", at)
        size = body[at:end].partition(b";")[0].strip() if end >= 0 else b""
        if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", size):
            return b"".join(pieces) if pieces else body
        length = int(size, 16)
        if length == 0:
            return b"".join(pieces)
        pieces.append(body[end + 2 : end + 2 + length])
        at = end + 2 + length + 2


def _inflated(body: bytes, encoding: str, limit: int) -> bytes:
    """An unpacked body; one that is not packed, though it says so, as it is (archives do that)."""
    is_gzip = body.startswith(b"\x1f\x8b")
    is_zlib = encoding == "deflate" and body[:1] == b"\x78"
    if encoding != "deflate" and not is_gzip:
        return body
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32 if is_gzip or is_zlib else -zlib.MAX_WBITS)
    try:
        data = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise ValueError(f"its body cannot be unpacked: {error}") from None
    if len(data) > limit:
        raise ValueError(f"its body unpacks to more than {limit} bytes")
    return data
