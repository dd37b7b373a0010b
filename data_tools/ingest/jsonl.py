"""JSON lines: one document a line, whole files or ranges of bytes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.ingest.found import HEAD_BYTES, Found, Reason, SetAside, from_record
from data_tools.ingest.settings import SourceSettings
from data_tools.ingest.unpack import BrokenStreamError, Line, lines, open_bytes

BOM = b"\xef\xbb\xbf"
# Not JSON, but written by many a Python program; meta holds null instead.
_DECODER = json.JSONDecoder(parse_constant=lambda _: None)


def read_jsonl(
    path: Path, name: str, source: SourceSettings, start: int = 0, end: int | None = None
) -> Iterator[Found]:
    """The documents of lines that begin at start ≤ byte < end.

    A document without an id is named by its file and line; in a file read in ranges by the byte its line
    begins at, since what precedes a range is not counted.
    """
    is_range = end is not None
    has_any = is_range
    last = name
    try:
        with open_bytes(path, max(start - 1, 0)) as stream:
            for line in lines(stream, source.max_document_bytes, start, end):
                last = place = f"{name}@{line.at}" if is_range else f"{name}:{line.number}"
                if (found := _document(place, line, source)) is None:
                    continue
                has_any = True
                yield found
                if isinstance(found, SetAside) and found.why == _NOT_LINES:
                    return
        if not has_any:
            yield SetAside(name, Reason.EMPTY)
    except BrokenStreamError as error:
        yield SetAside(
            name, error.reason, b"", 0, f"after {last}: {error.why}" if last != name else error.why
        )


_NOT_LINES = "one JSON value over many lines; give one object a line"


def _document(place: str, line: Line, source: SourceSettings) -> Found | None:
    """What a line holds, None if nothing."""
    data, size = line.data, line.size
    if not line.is_whole:
        return SetAside(place, Reason.TOO_LONG, data, size, f"{size} bytes")
    if line.at == 0:
        data = data.removeprefix(BOM)
    if not data.strip():
        return None
    try:
        text = data.decode("utf-8", source.encoding_errors)
    except UnicodeDecodeError as error:
        return SetAside(
            place, Reason.NOT_UTF8, data[:HEAD_BYTES], size, f"byte {error.start}: {error.reason}"
        )
    try:
        record: Any = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        why = _NOT_LINES if line.at == 0 and data.strip() in (b"[", b"{") else _position(error)
        return SetAside(place, Reason.MALFORMED, data[:HEAD_BYTES], size, why)
    if not isinstance(record, dict):
        why = f"a {'list' if isinstance(record, list) else 'value'}, not an object"
        return SetAside(place, Reason.MALFORMED, data[:HEAD_BYTES], size, why)
    return from_record(place, record, source, data[:HEAD_BYTES], size)


def _position(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"
