"""Web pages and archives: characters, text, records, and what is broken among them."""

from __future__ import annotations

import gzip
import io
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.ingest import SourceSettings
from data_tools.ingest.found import Document, Found, Note, Reason, SetAside
from data_tools.ingest.html import decode, page_document, read_html
from data_tools.ingest.warc import http_body, read_warc

SOURCE = SourceSettings(name="s", path="p")
PROSE = "A paragraph of some length that is plainly what a reader came to this page for, and nothing else. "
PAGE = f"""<html><head><title> The
 title</title><style>p {{}}</style></head><body><nav><a href="/">Home</a><a href="/x">Elsewhere</a></nav>
<main><h1>Heading</h1><p>{PROSE * 3}</p><p>naïve café</p></main><footer>Imprint</footer>
<script>alert(1)</script></body></html>"""


def page(data: bytes, charset: str | None = None, source: SourceSettings = SOURCE) -> list[Found]:
    return list(page_document("x.html", "x.html", data, charset, {}, source))


def test_a_page(tmp_path: Path) -> None:
    (tmp_path / "x.html.gz").write_bytes(gzip.compress(PAGE.encode()))
    (item,) = read_html(tmp_path / "x.html.gz", "x.html.gz", SOURCE)
    assert isinstance(item, Document)
    assert (item.doc_id, item.meta, item.raw_bytes) == (
        "x.html.gz",
        {"title": "The title"},
        len(PAGE.encode()),
    )
    text = item.text.decode()
    assert text.startswith("Heading")
    assert "naïve café" in text
    assert not any(word in text for word in ("Home", "Imprint", "alert", "{"))
    (everything,) = page(PAGE.encode(), None, SOURCE.model_copy(update={"html_main_content": False}))
    assert isinstance(everything, Document)
    assert b"Imprint" in everything.text


def test_trafilatura() -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    (item,) = page(PAGE.encode(), None, SOURCE.model_copy(update={"html_extractor": "trafilatura"}))
    assert isinstance(item, Document)
    assert "naïve café" in item.text.decode()
    assert "alert" not in item.text.decode()


@pytest.mark.parametrize(
    ("data", "charset"),
    [
        ("naïve €".encode(), None),
        ("naïve €".encode("windows-1252"), "iso-8859-1"),
        ("\ufeffnaïve €".encode("utf-16-le"), "utf-8"),
        ("\ufeffnaïve €".encode("utf-16-be"), None),
        ("\ufeffnaïve €".encode(), "latin1"),
        ('<meta charset="windows-1252">naïve €'.encode("windows-1252"), None),
        ("naïve €".encode(), "no-such-charset"),
    ],
)
def test_which_bytes_are_which_characters(data: bytes, charset: str | None) -> None:
    assert decode(data, charset).endswith("naïve €")


def test_bad_pages() -> None:
    def reason(data: bytes) -> Reason:
        (item,) = page(data)
        assert isinstance(item, SetAside)
        return item.reason

    assert reason(b" \n") is Reason.EMPTY
    assert reason(b"<html><body><script>x</script></body></html>") is Reason.NOTHING_EXTRACTED
    start = time.process_time()
    assert reason(b"<body>" + b"<div>" * 100_000 + b"x") is Reason.TOO_DEEP
    assert reason(b"<body>" + b"<div><!--</div>-->" * 5_000 + b"x") is Reason.TOO_DEEP
    assert time.process_time() - start < 2  # extraction would take minutes
    (shallow,) = page(b"<body>" + b"<p>some words</p>" * 2000)
    assert isinstance(shallow, Document)
    note, item = page(f"<body><p>{PROSE}".encode() + b"\xff</p>", "utf-8")
    assert isinstance(note, Note)
    assert isinstance(item, Document)
    assert "\ufffd" in item.text.decode()


def record(kind: str, block: bytes, number: int = 0, **more: str) -> bytes:
    headers = {
        "WARC-Type": kind,
        "WARC-Record-ID": f"<urn:uuid:{number:04d}>",
        "WARC-Target-URI": f"http://example.org/{number}",
        "WARC-Date": "2024-01-01T00:00:00Z",
        "Content-Length": str(len(block)),
    } | {key.replace("_", "-"): value for key, value in more.items()}
    head = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    return f"WARC/1.0\r\n{head}\r\n".encode() + block + b"\r\n\r\n"


def response(number: int, status: str = "200 OK", kind: str = "text/html; charset=utf-8") -> bytes:
    http = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n\r\n".encode() + PAGE.encode()
    return record("response", http, number, Content_Type="application/http; msgtype=response")


def read(path: Path, data: bytes, source: SourceSettings = SOURCE) -> tuple[list[str], list[Found]]:
    """The ids of documents, and everything else."""
    path.write_bytes(data)
    items = list(read_warc(path, path.name, source))
    return [d.doc_id for d in items if isinstance(d, Document)], [
        i for i in items if not isinstance(i, Document)
    ]


def packed(*records: bytes) -> bytes:
    return b"".join(gzip.compress(item, mtime=0) for item in records)


RECORDS = [
    record("warcinfo", b"software: x\r\n"),
    record("request", b"GET / HTTP/1.1\r\n\r\n", 1),
    response(2),
    response(3, status="404 Not Found"),
    response(4, kind="image/png"),
    record("conversion", "Ünïcode text".encode(), 5, Content_Type="text/plain"),
    response(6, kind="text/plain"),
    response(7, status="206 Partial Content"),
]


@pytest.mark.parametrize("suffix", [".warc", ".warc.gz"])
def test_an_archive(tmp_path: Path, suffix: str) -> None:
    data = packed(*RECORDS) if suffix.endswith("gz") else b"".join(RECORDS)
    ids, rest = read(tmp_path / f"x{suffix}", data)
    assert ids == ["0002", "0005", "0006"]
    assert sorted(item.what for item in rest if isinstance(item, Note)) == [
        "WARC records left out: request",
        "WARC records left out: warcinfo",
        "WARC responses left out: neither HTML nor plain text",
        "WARC responses left out: status other than 200",
        "WARC responses left out: status other than 200",
    ]
    assert len(rest) == 5
    documents = [d for d in read_warc(tmp_path / f"x{suffix}", "x", SOURCE) if isinstance(d, Document)]
    assert documents[0].text.startswith(b"Heading")
    assert documents[0].meta == {
        "url": "http://example.org/2",
        "date": "2024-01-01T00:00:00Z",
        "title": "The title",
    }
    assert documents[1].text == "Ünïcode text".encode()


@pytest.mark.parametrize("charset", ["undefined", "punycode", "unicode_escape", "rot13", "no-such"])
def test_a_charset_that_cannot_be_costs_its_record(tmp_path: Path, charset: str) -> None:
    data = [response(1, kind=f"text/plain; charset={charset}"), response(2, kind="text/plain")]
    ids, rest = read(tmp_path / "x.warc", b"".join(data))
    assert ids == ["0002"]
    assert [item.reason for item in rest if isinstance(item, SetAside)] == [Reason.NOT_UTF8]


def test_archives_against_fastwarc(tmp_path: Path) -> None:
    warc = pytest.importorskip("fastwarc.warc")
    path = tmp_path / "x.warc.gz"
    ids, _ = read(path, packed(*RECORDS))
    theirs = {
        record.record_id.removeprefix("<urn:uuid:").rstrip(">"): record.reader.read()
        for record in warc.ArchiveIterator(io.BytesIO(path.read_bytes()), parse_http=True)
    }
    assert set(ids) <= set(theirs)
    documents = {d.doc_id: d for d in read_warc(path, "x", SOURCE) if isinstance(d, Document)}
    assert documents["0006"].text == theirs["0006"]


def broken() -> Iterator[tuple[str, bytes, list[str], Reason]]:
    """Archives with something broken between records 1 and 3: what is still found, and why not the rest."""
    a, b, c = (record("conversion", f"text {n}\n".encode() * 9, n) for n in (1, 2, 3))
    no_length = b.replace(b"Content-Length: 63", b"Content-Length: many")
    yield "no length", a + no_length + c, ["0001", "0003"], Reason.BROKEN_RECORD
    yield "too short", a + b.replace(b"th: 63", b"th: 5") + c, ["0001", "0002", "0003"], Reason.BROKEN_RECORD
    huge = b.replace(b"th: 63", b"th: 999999999999999")
    yield "too long", a + huge + c, ["0001", "0003"], Reason.TOO_LONG
    yield "rubbish", a + b"\x01\x02 rubbish\nmore\n" + c, ["0001", "0003"], Reason.BROKEN_RECORD
    yield (
        "no colon",
        a + b.replace(b"WARC-Date: 2024-01-01T00:00:00Z", b"WARC-Date") + c,
        ["0001", "0003"],
        Reason.BROKEN_RECORD,
    )
    yield (
        "endless header",
        a + b"WARC/1.0\r\n" + b"x" * 200_000 + b"\r\n" + c,
        ["0001", "0003"],
        Reason.BROKEN_RECORD,
    )
    yield "cut off", a + b[:-30], ["0001"], Reason.BREAKS_OFF
    yield "cut in headers", a + b[:30], ["0001"], Reason.BROKEN_RECORD
    flipped = bytearray(gzip.compress(b))
    flipped[-5] ^= 1
    yield "checksum", packed(a) + bytes(flipped) + packed(c), ["0001", "0002", "0003"], Reason.BREAKS_OFF
    flipped = bytearray(gzip.compress(b))
    flipped[30] ^= 0xFF
    yield "flip", packed(a) + bytes(flipped) + packed(c), ["0001", "0003"], Reason.BREAKS_OFF
    yield "cut member", packed(a, b)[:-20], ["0001"], Reason.BREAKS_OFF


@pytest.mark.parametrize(("what", "data", "ids", "reason"), list(broken()), ids=lambda item: str(item)[:20])
def test_a_broken_record_costs_itself(
    tmp_path: Path, what: str, data: bytes, ids: list[str], reason: Reason
) -> None:
    name = "x.warc.gz" if data.startswith(b"\x1f\x8b") else "x.warc"
    seen, rest = read(tmp_path / name, data)
    assert reason in [item.reason for item in rest if isinstance(item, SetAside)], what
    assert [doc_id for doc_id in seen if doc_id != "0002"] == [doc_id for doc_id in ids if doc_id != "0002"]


def test_bodies() -> None:
    def body(raw: bytes, **headers: str) -> bytes:
        rows = "".join(f"{key.replace('_', '-')}: {value}\r\n" for key, value in headers.items())
        return http_body(f"HTTP/1.1 200 OK\r\n{rows}\r\n".encode() + raw, 1000)[2]

    chunked = b"4;x=y\r\nWiki\r\n6\r\npedia \r\n0\r\n\r\n"
    assert body(chunked, Transfer_Encoding="chunked") == b"Wikipedia "
    assert body(b"not chunked", Transfer_Encoding="chunked") == b"not chunked"
    assert body(chunked[:8], Transfer_Encoding="chunked") == b"W"
    assert body(gzip.compress(b"text"), Content_Encoding="gzip") == b"text"
    assert body(b"text", Content_Encoding="gzip") == b"text"
    assert body(zlib.compress(b"text"), Content_Encoding="deflate") == b"text"
    assert body(zlib.compress(b"text")[2:-4], Content_Encoding="deflate") == b"text"
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        body(gzip.compress(b"a" * 5000), Content_Encoding="gzip")
    with pytest.raises(ValueError, match="'br'"):
        body(b"x", Content_Encoding="br")
    for bad in (b"", b"\xff\xfe", b"HTTP/1.1", b"HTTP/1.1 abc\r\n\r\n"):
        with pytest.raises(ValueError, match="not an HTTP response"):
            http_body(bad, 1000)
