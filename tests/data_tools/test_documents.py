"""Parts: the same bytes however they are written, whole or not there, damage named."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import documents
from data_tools.documents import SCHEMA, PartWriter, read_part, text_column, texts, with_column
from megalite.errors import DataError


def batch(rows: list[str]) -> pa.RecordBatch:
    """Documents with these texts."""
    table = [{"id": f"d{n}", "source": "s", "text": text} for n, text in enumerate(rows)]
    return pa.RecordBatch.from_pylist(table, SCHEMA)


def write(path: Path, batches: list[pa.RecordBatch]) -> bytes:
    """A part of these batches; its bytes."""
    with PartWriter(path) as writer:
        for item in batches:
            writer.write(item)
    return path.read_bytes()


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.text(max_size=40), max_size=12), cuts=st.lists(st.integers(0, 12), max_size=4))
def test_a_part_does_not_depend_on_how_it_was_cut_into_batches(
    rows: list[str], cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    whole = batch(rows)
    bounds = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    pieces = [whole.slice(a, b - a) for a, b in zip(bounds, bounds[1:], strict=False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "GROUP_BYTES", 50)
        patch.setattr(documents, "GROUP_ROWS", 3)
        first, second = write(folder / "a.parquet", [whole]), write(folder / "b.parquet", pieces)
    assert first == second
    read = [text for part in read_part(folder / "a.parquet") for text in part.column("text").to_pylist()]
    assert read == rows
    file = pq.ParquetFile(folder / "a.parquet")
    for group in range(file.num_row_groups):
        found = file.read_row_group(group).column("text").to_pylist()
        assert len(found) <= 3
        assert len(found) == 1 or sum(len(text.encode()) for text in found) <= 50


def test_a_row_group_is_bounded_by_meta_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "GROUP_BYTES", 50)
    rows = [{"id": str(n), "source": "s", "text": "x", "meta": "m" * 20} for n in range(7)]
    write(tmp_path / "a.parquet", [pa.RecordBatch.from_pylist(rows, SCHEMA)])
    assert [part.num_rows for part in read_part(tmp_path / "a.parquet")] == [2, 2, 2, 1]


def test_an_empty_part_has_one_empty_batch(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [])
    (only,) = read_part(tmp_path / "a.parquet", ["text"])
    assert (only.num_rows, only.schema.names) == (0, ["text"])


def test_nothing_is_left_of_a_part_that_failed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), PartWriter(tmp_path / "a.parquet") as writer:
        writer.write(batch(["hello"]))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    content = write(path, [batch(["hello world " * 40, "grüße", ""])])
    rows = next(iter(read_part(path))).to_pylist()
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        try:
            assert next(iter(read_part(path))).to_pylist() == rows, at
        except DataError as error:
            assert str(path) in str(error)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.parquet is damaged"):
        list(read_part(path))


def test_a_missing_part_or_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no part .*gone\.parquet"):
        list(read_part(tmp_path / "gone.parquet"))
    write(tmp_path / "a.parquet", [batch(["x"])])
    with pytest.raises(DataError, match="has no column language; there are id, meta, source, text"):
        list(read_part(tmp_path / "a.parquet", ["language"]))


@given(st.lists(st.text()), st.integers(0, 3))
def test_texts_are_the_bytes_of_a_column(rows: list[str], start: int) -> None:
    column = pa.array(rows, pa.string())[start:]
    view = texts(column)
    sliced = [bytes(view.data[a:b]).decode() for a, b in zip(view.offsets, view.offsets[1:], strict=False)]
    assert sliced == rows[start:]
    again = text_column(view.data[view.offsets[0] : view.offsets[-1]], view.offsets - view.offsets[0])
    assert again.to_pylist() == rows[start:]


def test_a_column_is_replaced_or_appended() -> None:
    changed = with_column(batch(["a", "b"]), "text", ["c", "d"])
    assert changed.column("text").to_pylist() == ["c", "d"]
    assert changed.schema.names == SCHEMA.names
    assert with_column(changed, "score", pa.array([1.0, 2.0])).column("score").to_pylist() == [1.0, 2.0]
