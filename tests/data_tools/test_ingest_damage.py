"""Files with flipped, missing and foreign bytes: whatever they hold is found, nothing is raised."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
import zstandard

from data_tools.ingest import SourceSettings
from data_tools.ingest.found import Document, Note, SetAside
from data_tools.ingest.plan import Piece
from data_tools.ingest.readers import read_piece

from .test_ingest_tables import write
from .test_ingest_web import PAGE, RECORDS, packed

LINES = "".join(json.dumps({"text": f"text {n} " * 9}) + "\n" for n in range(100)).encode()
FILES = {
    "x.jsonl": LINES,
    "x.jsonl.gz": gzip.compress(LINES, mtime=0),
    "x.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(LINES),
    "x.warc": b"".join(RECORDS),
    "x.warc.gz": packed(*RECORDS),
    "x.html": PAGE.encode(),
    "x.md": LINES,
}


def damaged(data: bytes, rng: random.Random) -> bytes:
    raw = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    if rng.random() < 0.3:
        del raw[rng.randrange(len(raw)) :]
    if rng.random() < 0.2:
        at = rng.randrange(len(raw) + 1)
        raw[at:at] = rng.randbytes(50)
    return bytes(raw)


@pytest.mark.parametrize("name", [*FILES, "x.parquet", "x.arrow"])
def test_damage_is_found_not_raised(tmp_path: Path, name: str) -> None:
    data = FILES[name] if name in FILES else write(tmp_path / name).read_bytes()
    source = SourceSettings(name="s", path=str(tmp_path), max_document_bytes=1 << 20)
    suffixes = {"jsonl": "jsonl", "warc": "warc", "html": "html", "md": "text"}
    kind = suffixes.get(name.split(".")[1], "table")
    rng = random.Random(name)
    for number in range(30):
        path = tmp_path / f"{number}-{name}"
        path.write_bytes(damaged(data, rng))
        items = list(read_piece(Piece(path, name, kind), source))
        assert all(isinstance(item, Document | SetAside | Note) for item in items)
        for item in items:
            if isinstance(item, Document):
                assert item.text.decode().strip()
            elif isinstance(item, SetAside):
                assert str(tmp_path) not in f"{item.place}{item.why}"
