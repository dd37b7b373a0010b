"""What readers find: documents, what is set aside and why, and what is counted and no more."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from typing import Any, NamedTuple

from data_tools.ingest.settings import SourceSettings

HEAD_BYTES = 4 << 10  # kept of what is set aside
MAX_ID_BYTES = 1 << 10


class Reason(StrEnum):
    """Why something is not a document."""

    EMPTY = "empty"
    MALFORMED = "malformed JSON"
    NO_TEXT_FIELD = "no text field"
    NOT_UTF8 = "not UTF-8"
    SURROGATE = "half a surrogate pair"
    BINARY = "binary file"
    PACKED = "archive to unpack"
    TOO_LONG = "over max_document_bytes"
    NOTHING_EXTRACTED = "no text in the page"
    TOO_DEEP = "page nested too deeply"
    BROKEN_PAGE = "page that cannot be decoded"
    BROKEN_RECORD = "broken WARC record"
    # These say that there may be more in the file than was read.
    BREAKS_OFF = "damaged or cut off"
    BOMB = "unpacks to far more than its size"
    STOPS = "stops being UTF-8 text"
    UNREADABLE = "cannot be read"
    LINK = "link out of the source"
    FOLDER_LINK = "link to a folder"


class Document(NamedTuple):
    """One document; `doc_id` is stable between runs and free of machine paths.

    `raw_bytes` is what it was extracted from, if that is not the text itself.
    """

    doc_id: str
    text: bytes  # UTF-8
    meta: dict[str, Any] | None = None
    raw_bytes: int | None = None


class SetAside(NamedTuple):
    """Something that is no document, named by file:line, file@byte or file."""

    place: str
    reason: Reason
    head: bytes = b""
    size: int = 0
    why: str = ""


class Note(NamedTuple):
    """Something to count, such as a WARC record of another kind."""

    what: str
    number: int = 1


Found = Document | SetAside | Note


def from_record(
    place: str, record: dict[str, Any], source: SourceSettings, head: bytes, size: int
) -> Document | SetAside:
    """A JSON object or a table's row as a document: its text, its id, and the rest as meta."""
    text = record.get(source.text_field)
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        why = f"{source.text_field} is {kind}, not a string" if source.text_field in record else ""
        return SetAside(place, Reason.NO_TEXT_FIELD, head, size, why or f"it has no {source.text_field}")
    try:
        data = text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, UTF-8 cannot
        if source.encoding_errors == "strict":
            return SetAside(place, Reason.SURROGATE, head, size)
        data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    if not text or text.isspace():
        return SetAside(place, Reason.EMPTY, head, size)
    if len(data) > source.max_document_bytes:
        return SetAside(place, Reason.TOO_LONG, head, size, f"{len(data)} bytes")
    if source.meta_fields is None:
        meta = {key: record[key] for key in record if key not in (source.text_field, source.id_field)}
    else:
        meta = {key: record[key] for key in source.meta_fields if key in record}
    return Document(_id(record.get(source.id_field)) or place, data, meta or None)


def _id(value: Any) -> str | None:
    """A usable id as text: a string or whole number, neither empty, nor endless, nor half a character."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    text = str(value)
    try:
        return text if 0 < len(text.encode()) <= MAX_ID_BYTES else None
    except UnicodeEncodeError:
        return None


def meta_json(meta: dict[str, Any], limit: int) -> tuple[str | None, int]:
    """Meta as JSON of at most `limit` bytes, keys sorted, and how many fields were left out for that,
    or for being nested too deeply."""
    try:
        text = _dump(meta)
    except RecursionError:  # read by the skin of its teeth
        return None, len(meta)
    if len(text) <= limit and text.isascii():
        return text, 0
    left_out = 0
    while meta and len(text.encode()) > limit:
        # The largest first; of equals the last by name, so that the choice is always the same.
        largest = max(sorted(meta), key=lambda key: len(_dump(meta[key])))
        meta = {key: value for key, value in meta.items() if key != largest}
        left_out += 1
        text = _dump(meta)
    return (text if meta else None), left_out


def _dump(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=_plain, allow_nan=False)
    except ValueError:
        return _dump(_finite(value))
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, sort_keys=True, default=_plain)
    return text


def _finite(value: Any) -> Any:
    """The same with null for infinities and what is not a number: JSON knows neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> str | None:
    """A value that JSON has no word for: dates and decimals as text, bytes as nothing."""
    return None if isinstance(value, bytes) else str(value)


def display_name(name: str) -> str:
    """A file's name as text: bytes of it that are not UTF-8 as backslash escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
