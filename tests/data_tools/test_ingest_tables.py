"""Parquet and Arrow tables, and Hugging Face datasets: their rows, their columns, their damage."""

from __future__ import annotations

import datetime as dt
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.ingest import SourceSettings, tables
from data_tools.ingest.found import Document, Note, Reason, SetAside, meta_json
from data_tools.ingest.plan import check, list_source
from data_tools.ingest.tables import read_table
from megalite.errors import DataError

SOURCE = SourceSettings(name="s", path="p")
TABLE = pa.table(
    {
        "text": ["one", None, "three", " ", "five"],
        "id": [1, 2, None, 4, 5],
        "when": [dt.datetime(2024, 1, 2, tzinfo=dt.UTC)] * 5,
        "score": [1.5, float("nan"), None, 2.0, 3.0],
        "picture": [b"\xff"] * 5,
        "tags": [["a"], [], None, ["b", "c"], ["d"]],
    }
)


def write(path: Path, table: pa.Table = TABLE, **more: Any) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, **more)
        return path
    make = pa.ipc.new_file if "file" in path.name else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow", "file.arrow"])
def test_a_column_whose_name_is_not_utf8(tmp_path: Path, name: str) -> None:
    table = pa.table({"text": ["one"], "broken": [1]})
    path = write(tmp_path / name, table, **({"store_schema": False} if "parquet" in name else {}))
    path.write_bytes(path.read_bytes().replace(b"broken", b"brok\xffn"))
    source = SOURCE.model_copy(update={"path": str(path)})
    check(source, list_source(source))
    assert [(item.place, item.reason) for item in read(path)] == [(name, Reason.BREAKS_OFF)]


def read(path: Path, **more: Any) -> list[Any]:
    return list(read_table(path, path.name, SOURCE.model_copy(update=more)))


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow", "file.arrow"])
def test_rows_are_documents(tmp_path: Path, name: str) -> None:
    note, *items = read(write(tmp_path / name))
    assert note == Note("table columns of bytes left out of meta", 1)
    documents = [item for item in items if isinstance(item, Document)]
    assert [(d.doc_id, d.text) for d in documents] == [("1", b"one"), (f"{name}:3", b"three"), ("5", b"five")]
    assert [(i.place, i.reason) for i in items if isinstance(i, SetAside)] == [
        (f"{name}:2", Reason.NO_TEXT_FIELD),
        (f"{name}:4", Reason.EMPTY),
    ]
    meta = meta_json(documents[0].meta or {}, 1000)[0]
    assert meta == '{"score": 1.5, "tags": ["a"], "when": "2024-01-02 00:00:00+00:00"}'
    chosen = [d for d in read(tmp_path / name, meta_fields=("score",)) if isinstance(d, Document)]
    assert [d.meta for d in chosen] == [{"score": 1.5}, None, {"score": 3.0}]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_other_types_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    path = write(tmp_path / "x.parquet", pa.table({"text": pa.array(["a", "b", "a"]).cast(kind)}))
    tables.check_table(path, SOURCE)
    assert [item.text for item in read(path)] == [b"a", b"b", b"a"]


def test_strings_that_are_not_utf8(tmp_path: Path) -> None:
    raw = pa.StringArray.from_buffers(3, *pa.array([b"good", b"b\xffd", b"fine"]).buffers()[1:])
    path = write(tmp_path / "x.parquet", pa.table({"text": raw, "id": raw}))
    good, bad, fine = read(path)
    assert (good.text, bad.reason, bad.head, fine.text) == (b"good", Reason.NOT_UTF8, b"b\xffd", b"fine")
    assert read(path, encoding_errors="replace")[1].text == "b\ufffdd".encode()


def test_large_row_groups_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_BYTES", 10_000)
    path = write(tmp_path / "x.parquet", pa.table({"text": [f"{n:0500d}" for n in range(1000)]}))
    rows = [batch.num_rows for batch in tables._parquet_batches(path, ["text"])]
    assert sum(rows) == 1000
    assert max(rows) <= 100
    assert len(read(path)) == 1000


def test_two_columns_of_a_name_are_refused_before_work(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array([b"c"]), pa.array([b"d"])]
    write(tmp_path / "x.parquet", pa.Table.from_arrays(columns, names=["text", "text", "blob", "blob"]))
    with pytest.raises(DataError, match=r"x\.parquet has two columns 'text'; rename one"):
        look(tmp_path)


def test_wrong_columns_are_refused_before_work(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", pa.table({"content": ["a"], "n": [1]}))
    with pytest.raises(
        DataError, match=r"source 's': .*x\.parquet has no column 'text'; there are content, n"
    ):
        look(tmp_path)
    with pytest.raises(DataError, match=r"column 'n' of .*x\.parquet is int64, expected text"):
        look(tmp_path, text_field="n")
    with pytest.raises(DataError, match="no column 'score'"):
        look(tmp_path, text_field="content", meta_fields=("score",))
    look(tmp_path, text_field="content")
    (tmp_path / "y.parquet").write_bytes(b"PAR1 not really")  # left for the reader to name
    look(tmp_path, text_field="content")


def look(path: Path, **more: Any) -> None:
    source = SourceSettings(name="s", path=str(path), **more)
    check(source, list_source(source))


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow", "file.arrow"])
def test_damaged_tables_are_named(tmp_path: Path, name: str) -> None:
    table = pa.table({"text": [f"text {n} " * 20 for n in range(2000)]})
    path = (
        write(tmp_path / name, table, row_group_size=100)
        if "parquet" in name
        else write(tmp_path / name, table)
    )
    data = path.read_bytes()
    for cut in (0, 5, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:cut])
        items = read(path)
        # A stream that is cut in its end marker is whole.
        if not (name == "stream.arrow" and cut == len(data) - 3):
            assert [i.reason for i in items if isinstance(i, SetAside)] == [Reason.BREAKS_OFF]
            assert str(tmp_path) not in items[-1].why
    if name == "x.parquet":
        middle = data.index(b"PAR1") + len(data) // 2
        path.write_bytes(data[:middle] + b"\xff" * 200 + data[middle + 200 :])
        items = read(path)
        assert 0 < len(items) <= 2001
        assert isinstance(items[-1], SetAside)


def test_a_hugging_face_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    made = datasets.Dataset.from_dict({"text": ["one", "two"], "id": ["a", "b"], "n": [1, 2]})
    made.save_to_disk(tmp_path / "saved")
    source = SourceSettings(name="s", path=str(tmp_path / "saved"), include=("*.arrow",))
    (piece,) = list_source(source).pieces
    assert [item.doc_id for item in read_table(piece.path, piece.name, source)] == ["a", "b"]  # type: ignore[union-attr]
    (tmp_path / "mine").mkdir()
    made.to_parquet(tmp_path / "mine" / "train.parquet")
    source = SourceSettings(name="s", path=f"hf:{tmp_path / 'mine'}")
    listing = list_source(source)
    check(source, listing)
    assert [item.text for p in listing.pieces for item in read_table(p.path, p.name, source)] == [
        b"one",
        b"two",
    ]  # type: ignore[union-attr]
    assert str(tmp_path) not in listing.fingerprint(source)
    for path, why in (
        ("hf:", "is not hf:"),
        (f"hf:{tmp_path / 'none'}", "cannot load"),
        ("hf:a:b:c[:5]", "plain"),
    ):
        with pytest.raises(DataError, match=why):
            list_source(SourceSettings(name="s", path=path))


def test_another_revision_of_a_hugging_face_dataset_is_another_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(revision: str) -> str:
        path = tmp_path / "default" / "0.0.0" / revision / "mine-train.arrow"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of equal size")
        made = SimpleNamespace(cache_files=[{"filename": str(path)}])
        package = SimpleNamespace(load_dataset=lambda *_, **__: made)
        monkeypatch.setitem(sys.modules, "datasets", package)
        source = SourceSettings(name="s", path="hf:some/thing")
        return list_source(source).fingerprint(source)

    assert told("7b6d24") == told("7b6d24") != told("0f1e2d")


def test_a_hugging_face_dataset_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'megalite\[hub\]'"):
        list_source(SourceSettings(name="s", path="hf:some/thing"))
