"""Tables of documents, a row each: Parquet, and the Arrow files of Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.ingest.found import HEAD_BYTES, Document, Found, Note, Reason, SetAside, from_record
from data_tools.ingest.settings import SourceSettings
from megalite.errors import DataError, nearest

TABLES = (".parquet", ".arrow")
BATCH_BYTES = 8 << 20  # of a table's columns, as far as its metadata is true
BATCH_ROWS = 4096
READ_BYTES = 1 << 20
_FILE_MAGIC = b"ARROW1"


def check_table(path: Path, source: SourceSettings) -> None:
    """Look at a table's columns before work starts. A file that is damaged is left for the reader to name.

    Raises:  DataError if it has no text column, or one of another type, or not the columns asked for
    """
    try:
        schema = _schema(path)
        names = schema.names
    except (OSError, pa.ArrowException, UnicodeDecodeError):
        return
    for key in (source.text_field, *(source.meta_fields or ())):
        if key not in names:
            raise DataError(f"source {source.name!r}: {path} has no column {key!r}; {nearest(key, names)}")
    wanted = [name for name in names if name in _columns(schema, source)]
    if twice := sorted({name for name in wanted if wanted.count(name) > 1}):
        raise DataError(
            f"source {source.name!r}: {path} has two columns {twice[0]!r}; rename one, or leave it out of "
            "meta_fields"
        )
    kind = schema.field(source.text_field).type
    if not _is_text(kind):
        raise DataError(
            f"source {source.name!r}: column {source.text_field!r} of {path} is {kind}, expected text; name "
            "another by text_field"
        )


def read_table(path: Path, name: str, source: SourceSettings) -> Iterator[Found]:
    """A table's rows as documents; one without an id is named by its file and row, from 1."""
    row = 0
    try:
        schema = _schema(path)
        columns = _columns(schema, source)
        if source.meta_fields is None and (absent := len(schema.names) - len(columns)):
            yield Note("table columns of bytes left out of meta", absent)
        read = _parquet_batches if path.suffix.lower() == ".parquet" else _arrow_batches
        for batch in read(path, columns):
            for record in _records(batch, source):
                row += 1
                place = f"{name}:{row}"
                yield _document(place, record, source)
    except (OSError, pa.ArrowException, ValueError) as error:
        detail = " ".join(str(error).split())[:500].replace(str(path), name)
        yield SetAside(name, Reason.BREAKS_OFF, why=f"after row {row}: {detail}" if row else detail)


def _document(place: str, record: dict[str, Any], source: SourceSettings) -> Document | SetAside:
    text = record.get(source.text_field)
    if isinstance(text, bytes):  # a string that is not UTF-8
        if source.encoding_errors == "strict":
            return SetAside(place, Reason.NOT_UTF8, text[:HEAD_BYTES], len(text))
        text = text.decode("utf-8", "replace")
        record = {**record, source.text_field: text}
    head = text[:HEAD_BYTES].encode()[:HEAD_BYTES] if isinstance(text, str) else b""
    return from_record(place, record, source, head, len(text.encode()) if isinstance(text, str) else 0)


def _schema(path: Path) -> pa.Schema:
    if path.suffix.lower() == ".parquet":
        return pq.read_schema(path)
    with pa.OSFile(str(path)) as file:
        return _arrow_reader(file).schema


def _arrow_reader(file: pa.NativeFile) -> Any:
    is_file = file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    file.seek(0)
    return pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view())


def _columns(schema: pa.Schema, source: SourceSettings) -> list[str]:
    """The columns to read: text, id, and those for meta, bytes such as pictures not among them."""
    wanted = {source.text_field, source.id_field}
    if source.meta_fields is None:
        wanted |= {field.name for field in schema if not _has_bytes(field.type)}
    else:
        wanted |= set(source.meta_fields)
    return [name for name in schema.names if name in wanted]


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return any(_has_bytes(kind.field(number).type) for number in range(kind.num_fields))


def _parquet_batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches of about BATCH_BYTES, however large the row groups; pages are read as they are needed."""
    with pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            row_bytes = max(1, about.total_byte_size // max(1, about.num_rows))
            rows = max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))
            yield from file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)


def _arrow_batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The batches of a file or stream, every byte of each checked before it is believed.

    Read, not mapped: a file that shrinks under a map kills the process.
    """
    with pa.OSFile(str(path)) as file:
        reader = _arrow_reader(file)
        is_file = hasattr(reader, "num_record_batches")
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            batch = batch.select(columns)
            batch.validate(full=True)
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.slice(start, BATCH_ROWS)


def _records(batch: pa.RecordBatch, source: SourceSettings) -> Iterator[dict[str, Any]]:
    """Rows as dicts; a string that is not UTF-8 as its bytes, a value Python cannot say as null."""
    columns = {name: _values(batch.column(name)) for name in batch.schema.names}
    meta = [name for name in columns if name not in (source.text_field, source.id_field)]
    for row in range(batch.num_rows):
        record = {
            name: columns[name][row] for name in (source.text_field, source.id_field) if name in columns
        }
        # Nulls say nothing.
        yield record | {name: value for name in meta if (value := columns[name][row]) is not None}


def _values(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (UnicodeDecodeError, ValueError, OverflowError, pa.ArrowException):
        return [_value(column[row]) for row in range(len(column))]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(scalar.type):
            scalar = scalar.value
        return scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else None
    except (ValueError, OverflowError, pa.ArrowException):
        return None
