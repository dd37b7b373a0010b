"""Parts: the Parquet files that steps hand to each other, written whole or not at all, read in batches.

A part holds documents, one a row. Every step keeps the columns it does not know. A row group holds about
GROUP_BYTES of text and meta, which bounds the memory of every step, and each page carries a checksum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megalite.data.folder import disk_errors
from megalite.data.staging import commit_file, staging_of
from megalite.errors import DataError, nearest

# id: stable between runs, free of machine paths. source: what a mixture's weights name. meta: a JSON object
# of whatever else came with the document, null if nothing did.
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("meta", pa.string()),
    ]
)
BUCKET = "bucket"  # the column that divides the documents of a source for a curriculum, once they are sorted
GROUP_BYTES = 8 << 20
GROUP_ROWS = 1 << 16
ZSTD_LEVEL = 1  # twice as fast as 3, for 1.4 times the size of what is not kept for long


def part_name(number: int) -> str:
    """The file name of a part; names sort as numbers do, up to a million parts."""
    return f"part-{number:06d}.parquet"


def part_number(path: Path) -> int:
    """The number in a part's file name."""
    return int(path.stem.removeprefix("part-"))


class Texts(NamedTuple):
    """A string column as its bytes: row i is `data[offsets[i] : offsets[i + 1]]`, UTF-8.

    Shapes:  data uint8 [bytes]; offsets int64 [rows + 1]
    """

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each row, int64 [rows]."""
        return np.diff(self.offsets)


def texts(column: pa.Array) -> Texts:
    """View a string column without copying its bytes. Nulls are empty."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if column.null_count:
        column = column.fill_null("")
    if column.type not in (pa.string(), pa.large_string()):
        raise TypeError(f"a column of {column.type} is not text")
    width = np.int32 if column.type == pa.string() else np.int64
    _, offsets, data = column.buffers()
    if len(column) == 0 or offsets is None:
        return Texts(np.zeros(0, np.uint8), np.zeros(len(column) + 1, np.int64))
    bounds = np.frombuffer(offsets, dtype=width)[column.offset : column.offset + len(column) + 1]
    flat = np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, np.uint8)
    return Texts(flat, bounds.astype(np.int64))


def text_column(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> pa.Array:
    """The inverse of `texts`: bytes that are valid UTF-8 and their row bounds as a string column.

    Raises:  DataError if the column exceeds what 32-bit offsets can say
    """
    if offsets[-1] > np.iinfo(np.int32).max:
        raise DataError(f"{int(offsets[-1])} bytes of text in one batch; split documents above 1 GiB")
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(np.ascontiguousarray(data))]
    return pa.Array.from_buffers(pa.string(), len(offsets) - 1, buffers)


def with_column(batch: pa.RecordBatch, name: str, values: Any) -> pa.RecordBatch:
    """The batch with a column set: replaced where it is there, appended where not."""
    array = values if isinstance(values, pa.Array) else pa.array(values)
    index = batch.schema.get_field_index(name)
    if index < 0:
        return batch.append_column(name, array)
    return batch.set_column(index, batch.schema.field(index).with_type(array.type), array)


def read_part(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """A part's batches, a row group each, in order; with `columns` only those. An empty part has one, empty.

    Raises:  DataError naming the file if it is missing, damaged, or has not the columns
    """
    with _opened(path) as file:
        names = file.schema_arrow.names
        wanted = list(names if columns is None else columns)
        if absent := [name for name in (*SCHEMA.names, *wanted) if name not in names]:
            raise DataError(f"{path} has no column {absent[0]}; {nearest(absent[0], names)}")
        for field in SCHEMA:  # pages have checksums, the footer that types them has none
            if (kind := file.schema_arrow.field(field.name).type) != field.type:
                raise DataError(f"{path}: column {field.name} is {kind}, not {field.type}; is it damaged?")
        if not file.num_row_groups:
            yield pa.RecordBatch.from_pylist([], file.schema_arrow).select(wanted)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=wanted, use_threads=False).select(wanted)
            yield table.combine_chunks().to_batches()[0]


def read_schema(path: Path) -> pa.Schema:
    """The columns of a part.

    Raises:  DataError naming the file if it is missing or damaged
    """
    with _opened(path) as file:
        return file.schema_arrow


def text_bytes(path: Path) -> int:
    """About how much text a part holds, from its footer.

    Raises:  DataError naming the file if it is missing or damaged
    """
    with _opened(path) as file:
        metadata, column = file.metadata, file.schema_arrow.get_field_index("text")
        groups = range(metadata.num_row_groups)
        return sum(metadata.row_group(group).column(column).total_uncompressed_size for group in groups)


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type holds numbers."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def check_number(schema: pa.Schema, name: str, key: str, where: str) -> None:
    """Raises:  DataError unless `where` has the column of numbers that the setting `key` names"""
    numbers = [field.name for field in schema if is_number(field.type)]
    if name not in numbers:
        raise DataError(f"{key}: {where} has no column of numbers {name!r}; {nearest(name, numbers)}")


def rows_by_source(batch: pa.RecordBatch) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Each source of a batch in the order of first rows, and which rows are of it, bool [rows]."""
    encoded = batch.column("source").dictionary_encode()
    codes = encoded.indices.to_numpy()
    for code, name in enumerate(encoded.dictionary.to_pylist()):
        yield name, codes == code


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"no part {path}; run the step that makes it again") from None
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove its step's folder, and run again") from None


class PartWriter:
    """Write a part; it appears under its name, durable, when the `with` block ends without an exception.

    Batches of any size are joined and cut to row groups of about GROUP_BYTES. The same rows give the same
    file, however they are cut into batches. A part without a row is a file all the same.

    Raises:  DataError if the disk refuses
    """

    def __init__(self, path: Path, schema: pa.Schema = SCHEMA) -> None:
        self._path = path
        self._staging = staging_of(path)
        self._schema = schema
        self._file: pq.ParquetWriter | None = None
        self._pending: list[pa.RecordBatch] = []
        self._bytes = self._rows = 0

    def __enter__(self) -> Self:
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = pq.ParquetWriter(
                self._staging,
                self._schema,
                compression="zstd",
                compression_level=ZSTD_LEVEL,
                use_dictionary=["source"],
                write_statistics=False,
                write_page_checksum=True,
            )
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows; columns in any order, all of the schema's."""
        batch = batch.select(self._schema.names)
        sizes = texts(batch.column("text")).sizes + texts(batch.column("meta")).sizes
        start = 0
        while start < batch.num_rows:
            # The rows that still fit, and at least one into an empty group.
            ends = self._bytes + np.cumsum(sizes[start : start + GROUP_ROWS - self._rows])
            count = int(np.searchsorted(ends, GROUP_BYTES, side="right"))
            if count == 0 and not self._rows:
                count = 1
            if count:
                self._pending.append(batch.slice(start, count))
                self._bytes, self._rows = int(ends[count - 1]), self._rows + count
                start += count
            if start < batch.num_rows or self._rows == GROUP_ROWS:
                self._flush()

    def _flush(self) -> None:
        if self._pending and self._file is not None:
            table = pa.Table.from_batches(self._pending).cast(self._schema)
            with disk_errors(self._path):
                self._file.write_table(table.combine_chunks(), row_group_size=GROUP_ROWS)
        self._pending, self._bytes, self._rows = [], 0, 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with disk_errors(self._path):
                if kind is None:
                    self._flush()
                if self._file is not None:
                    self._file.close()
                if kind is None:
                    commit_file(self._staging, self._path)
        finally:
            self._staging.unlink(missing_ok=True)
