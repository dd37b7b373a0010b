"""Which reader reads a piece of a source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from data_tools.ingest.found import Found, SetAside
from data_tools.ingest.html import read_html
from data_tools.ingest.jsonl import read_jsonl
from data_tools.ingest.plan import Piece
from data_tools.ingest.settings import SourceSettings
from data_tools.ingest.stdlib import TOPICS, read_stdlib, read_topics
from data_tools.ingest.tables import read_table
from data_tools.ingest.text import read_code, read_text
from data_tools.ingest.warc import read_warc

_READERS: dict[str, Callable[[Path, str, SourceSettings], Iterator[Found]]] = {
    "code": read_code,
    "html": read_html,
    "stdlib": read_stdlib,
    "table": read_table,
    "text": read_text,
    "warc": read_warc,
}


def read_piece(piece: Piece, source: SourceSettings) -> Iterator[Found]:
    """What a piece holds, in order, in bounded memory. Bad input is found, not raised."""
    if piece.reason is not None:
        return iter([SetAside(piece.name, piece.reason, size=piece.size, why=piece.why)])
    if piece.kind == TOPICS:
        return read_topics()
    if piece.kind == "jsonl":
        return read_jsonl(piece.path, piece.name, source, piece.start, piece.end)
    return _READERS[piece.kind](piece.path, piece.name, source)
