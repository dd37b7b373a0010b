"""JSON lines and packed files: every line once, whatever its bytes, wherever a file is cut or breaks."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_tools.ingest import SourceSettings, unpack
from data_tools.ingest.found import Document, Found, Reason, SetAside, meta_json
from data_tools.ingest.jsonl import BOM, read_jsonl
from data_tools.ingest.text import read_text
from data_tools.ingest.unpack import BrokenStreamError, ByteStream, Line, buffered, lines, open_bytes

SOURCE = SourceSettings(name="s", path="p")
PACK = {
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def found(path: Path, source: SourceSettings = SOURCE) -> list[Found]:
    return list(read_jsonl(path, path.name, source))


def aside(items: list[Found]) -> list[tuple[str, Reason]]:
    return [(item.place, item.reason) for item in items if isinstance(item, SetAside)]


def line_range(data: bytes, limit: int, start: int, end: int) -> list[Line]:
    stream = io.BytesIO(data)
    stream.seek(max(start - 1, 0))
    return list(lines(io.BufferedReader(stream), limit, start, end))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.binary(max_size=12), max_size=12).map(b"\n".join),
    st.lists(st.integers(0, 150), max_size=6),
    st.integers(1, 15),
)
def test_ranges_give_every_line_once(data: bytes, cuts: list[int], limit: int) -> None:
    bounds = [0, *sorted({cut for cut in cuts if 0 < cut < len(data)}), max(len(data), 1)]
    parts = [line_range(data, limit, a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    whole = data.splitlines(keepends=True) if not set(data) & set(b"\r") else None
    seen = [line for part in parts for line in part]
    assert [(line.at, line.size) for line in seen] == [
        (line.at, line.size) for line in lines(io.BufferedReader(io.BytesIO(data)), limit)
    ]
    assert sum(line.size for line in seen) == len(data)
    for line in seen:
        raw = data[line.at : line.at + line.size]
        assert raw.endswith(b"\n") or line.at + line.size == len(data)
        assert raw.count(b"\n") <= 1
        assert line.is_whole == (len(raw.removesuffix(b"\n")) <= limit)
        assert line.data == raw if line.is_whole else raw.startswith(line.data)
    if whole is not None and not set(data) & set(b"\x0b\x0c\x1c\x1d\x1e\x85"):
        assert len(seen) == len(whole)


def test_a_file_in_ranges_is_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{n}" * (n % 7)}) + "\n" for n in range(200)))
    size = path.stat().st_size
    whole = [item.text for item in found(path) if isinstance(item, Document)]
    bounds = [size * n // 5 for n in range(6)]
    parts = [
        item
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        for item in read_jsonl(path, "x.jsonl", SOURCE, a, b)
    ]
    assert [item.text for item in parts if isinstance(item, Document)] == whole
    ids = [item.doc_id for item in parts if isinstance(item, Document)]
    assert len(set(ids)) == len(ids)
    at = int(ids[70].removeprefix("x.jsonl@"))
    assert json.loads(path.read_bytes()[at:].split(b"\n")[0])["text"].encode() == whole[70]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', Reason.MALFORMED),
        (b"nonsense", Reason.MALFORMED),
        (b"[1, 2]", Reason.MALFORMED),
        (b"[" * 100_000, Reason.MALFORMED),
        (b'{"text": ' + b"9" * 5000 + b"}", Reason.MALFORMED),
        (b'{"text": 5}', Reason.NO_TEXT_FIELD),
        (b'{"text": null}', Reason.NO_TEXT_FIELD),
        (b'{"Text": "a"}', Reason.NO_TEXT_FIELD),
        (b'{"text": "\\ud800"}', Reason.SURROGATE),
        (b'{"text": "\xff"}', Reason.NOT_UTF8),
        (b'{"text": " \\n\\u3000"}', Reason.EMPTY),
        (b'{"text": "' + b"x" * 200_000 + b'"}', Reason.TOO_LONG),
    ],
)
def test_a_bad_line_costs_itself(tmp_path: Path, line: bytes, reason: Reason) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n\n{"text": "two", "id": 7}')
    items = found(path, SOURCE.model_copy(update={"max_document_bytes": 150_000}))
    assert aside(items) == [("x.jsonl:2", reason)]
    assert [(d.doc_id, d.text) for d in items if isinstance(d, Document)] == [
        ("x.jsonl:1", b"one"),
        ("7", b"two"),
    ]
    bad = next(item for item in items if isinstance(item, SetAside))
    assert line.startswith(bad.head[:-1])
    assert bad.size == len(line) + 1


def test_bad_bytes_are_replaced_on_request(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a\xffb"}\n{"text": "c\\ud800d"}\n')
    items = found(path, SOURCE.model_copy(update={"encoding_errors": "replace"}))
    assert [item.text.decode() for item in items if isinstance(item, Document)] == ["a\ufffdb", "c\ufffdd"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.sampled_from(["text", "id", "a", "b"]), JSON, max_size=4), max_size=5))
def test_records_against_the_json_module(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    items = found(path)
    if not records:
        assert items == [SetAside(path.name, Reason.EMPTY)]
        return
    assert len(items) == len(records)
    for item, record in zip(items, records, strict=True):
        text = record.get("text")
        is_good = isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text) and text.strip()
        assert isinstance(item, Document) == bool(is_good)
        if isinstance(item, Document):
            assert item.text.decode() == text
            meta, left_out = meta_json(item.meta or {}, 1 << 20)
            assert left_out == 0
            meta.encode() if meta else None
            rest = {key: record[key] for key in record if key not in ("text", "id")}
            if "NaN" not in json.dumps(rest) and "Infinity" not in json.dumps(rest):
                assert json.loads(meta or "{}") == rest
            else:
                json.loads(meta or "", parse_constant=pytest.fail)


def test_meta_is_bounded_and_ordered() -> None:
    meta = {"b": "x" * 50, "a": 1, "c": "y" * 60, "d": "é\ud800"}
    assert meta_json(meta, 1000)[0] == json.dumps(meta, sort_keys=True)
    assert meta_json(meta, 90) == (json.dumps({"a": 1, "b": "x" * 50, "d": "é\ud800"}, sort_keys=True), 1)
    assert meta_json({"a": "x" * 99}, 50) == (None, 1)


def test_meta_nested_as_deeply_as_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for depth in range(400, 1200, 100):
        path.write_text(f'{{"text": "a", "b": 1, "m": {"[" * depth}1e999{"]" * depth}}}\n')
        for item in found(path):
            if isinstance(item, Document):
                meta, left_out = meta_json(item.meta or {}, 1 << 20)
                assert (meta is None) == (left_out == 2)
            else:
                assert isinstance(item, SetAside)
                assert item.why == "nested too deeply"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_precedes_a_break_is_kept(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.jsonl{suffix}"
    rows = [json.dumps({"text": f"text {n}", "x": n * 7919 % 1000}).encode() + b"\n" for n in range(400)]
    first, second = PACK[suffix](b"".join(rows[:200])), PACK[suffix](b"".join(rows[200:]))
    path.write_bytes(first + second)
    assert len(found(path)) == 400
    path.write_bytes(first + second[:-5])
    items = found(path)
    assert aside(items) == [(path.name, Reason.BREAKS_OFF)]
    assert 200 <= len(items) - 1 <= 400
    assert all(isinstance(item, Document) for item in items[:-1])
    if suffix == ".gz":  # all but what the last bytes are needed for
        assert len(items) > 390
    damaged = bytearray(first + second)
    damaged[len(first) + len(second) // 2] ^= 0xFF
    path.write_bytes(damaged)
    items = found(path)
    assert aside(items)[-1] == (path.name, Reason.BREAKS_OFF)
    assert [item.text for item in items[:150]] == [f"text {n}".encode() for n in range(150)]  # type: ignore[union-attr]
    path.write_bytes(first + b"trailing rubbish" * 10)
    assert aside(found(path)) == [(path.name, Reason.BREAKS_OFF)]
    path.write_bytes(b"")
    assert aside(found(path)) == [(path.name, Reason.EMPTY)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_is_stopped(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "ALWAYS_ALLOWED_BYTES", 1 << 20)
    monkeypatch.setattr(unpack, "MAX_RATIO", 100)
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(PACK[suffix](b'{"text": "fine"}\n' + b" " * (8 << 20)))
    source = SOURCE.model_copy(update={"max_document_bytes": 1000})
    assert aside(found(path, source)) == [(path.name, Reason.BOMB)]
    with open_bytes(path) as stream, pytest.raises(BrokenStreamError):
        while stream.read(1 << 16):
            pass


def test_a_zstd_window_is_bounded(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=29)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(packer.compress(b'{"text": "a"}\n') + packer.flush())
    assert aside(found(path)) == [(path.name, Reason.BREAKS_OFF)]


def test_a_file_that_cannot_be_opened_can_be_closed(tmp_path: Path) -> None:
    """As Python does with whatever an `__init__` left that raised."""
    stream = ByteStream.__new__(ByteStream)
    with pytest.raises(BrokenStreamError):
        stream.__init__(tmp_path / "gone")  # type: ignore[misc]
    stream.close()
    assert stream.closed


def test_an_endless_line_is_not_held(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(PACK[".gz"](b'{"text": "' + b"x" * (40 << 20) + b'"}\n{"text": "after"}\n'))
    tracemalloc.start()
    items = found(path, SOURCE.model_copy(update={"max_document_bytes": 1 << 20}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert aside(items) == [("x.jsonl.gz:1", Reason.TOO_LONG)]
    assert isinstance(items[1], Document)
    assert peak < 30 << 20  # a step of unpacking gives 8 MiB at most, joined from pieces


def test_one_value_over_many_lines_is_one_file_set_aside(tmp_path: Path) -> None:
    for value in ([{"text": "a"}], {"text": "a"}):
        path = tmp_path / "x.json"
        path.write_text(json.dumps(value, indent=2))
        assert aside(found(path)) == [("x.json:1", Reason.MALFORMED)]


def test_going_on_at_the_next_member(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    members = [PACK[".gz"](f"member {n}".encode() * 50) for n in range(3)]
    broken = bytearray(members[1])
    broken[-6] ^= 0xFF  # its checksum
    path.write_bytes(members[0] + bytes(broken) + unpack.GZIP_MAGIC + b"chance" + members[2])
    raw = ByteStream(path)
    seen, breaks, goes_on = b"", 0, True
    while goes_on:
        stream = buffered(raw)
        try:
            while piece := stream.read1(100):
                seen += piece
            goes_on = False
        except BrokenStreamError:
            breaks += 1
            goes_on = raw.skip_member()
        finally:
            stream.detach()
    raw.close()
    assert breaks == 1
    assert seen.endswith(b"member 2")
    assert zlib.crc32(seen[:400]) == zlib.crc32(b"member 0" * 50)


def test_text_files(tmp_path: Path) -> None:
    def read(data: bytes, name: str = "x.md", **more: Any) -> Found:
        (tmp_path / name).write_bytes(data)
        (item,) = read_text(tmp_path / name, name, SOURCE.model_copy(update=more))
        return item

    assert read("\ufeffé\r\n".encode()) == Document("x.md", "é\r\n".encode(), raw_bytes=7)
    assert read(PACK[".zst"](b"packed"), "x.txt.zst").text == b"packed"  # type: ignore[union-attr]
    assert read(b"a\0b").reason is Reason.BINARY  # type: ignore[union-attr]
    assert read(b"a\xff").reason is Reason.NOT_UTF8  # type: ignore[union-attr]
    assert read(b"a\xff", encoding_errors="replace").text == "a\ufffd".encode()  # type: ignore[union-attr]
    assert read(b" \n").reason is Reason.EMPTY  # type: ignore[union-attr]
    assert read(b"a" * 101, max_document_bytes=100).reason is Reason.TOO_LONG  # type: ignore[union-attr]
    matter = b"---\ntitle: x\n---\nText\n---\n"
    assert read(matter).text == matter  # type: ignore[union-attr]
    assert read(matter, strip_front_matter=True).text == b"Text\n---\n"  # type: ignore[union-attr]
    assert read(b"---\nno end\n", strip_front_matter=True).text == b"---\nno end\n"  # type: ignore[union-attr]
    (missing,) = read_text(tmp_path / "missing", "missing", SOURCE)
    assert missing.reason is Reason.UNREADABLE  # type: ignore[union-attr]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text("aé漢😀 \n", max_size=60), st.integers(1, 9))
@example("é" * 9, 3)  # no line ends near where a piece does
def test_pieces_of_a_text_are_the_text(tmp_path: Path, text: str, size: int) -> None:
    path, source = tmp_path / "a.txt", SOURCE.model_copy(update={"piece_bytes": size})
    path.write_bytes(BOM + text.encode())
    items = list(read_text(path, "a.txt", source))
    documents = [item for item in items if isinstance(item, Document)]
    assert {reason for _, reason in aside(items)} <= {Reason.EMPTY}
    assert "".join(item.text.decode() for item in documents if len(items) == len(documents)) in (text, "")
    assert "".join("".join(item.text.decode().split()) for item in documents) == "".join(text.split())
    assert all(len(item.text) < 2 * size + 4 for item in documents)
    path.write_bytes((text + "é").encode()[:-1])
    *_, last = read_text(path, "a.txt", source)
    assert isinstance(last, SetAside)
    assert last.reason in (Reason.STOPS, Reason.NOT_UTF8)
    path.write_bytes(BOM[:2])
    assert aside(list(read_text(path, "a.txt", source))) == [("a.txt@0", Reason.NOT_UTF8)]
