"""The shard format: what is written is read back, and what is damaged is refused."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data import manifest as manifest_module
from megalite.data.ipc import check_declared_size, shard_schema
from megalite.data.shards import Dataset, verify
from megalite.data.tokenizer import ByteTokenizer
from megalite.data.writer import ShardWriter
from megalite.errors import DataError

from .datasets import WideTokenizer, random_documents, write

LENGTHS = [5, 1, 90, 1, 1, 40, 7, 900, 12, 64]


def edit_manifest(folder: Path, change) -> None:
    """Apply `change` to the manifest and sign it again, as an attacker or a careless tool would."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    content.pop("crc32", None)
    content["crc32"] = manifest_module._crc(content)
    path.write_text(json.dumps(content))


def read_everything(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    return dataset.read(0, dataset.total_tokens)[:2]


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WideTokenizer()])
def test_round_trip(tmp_path, compression, tokenizer):
    documents = random_documents(LENGTHS, tokenizer.vocab_size)
    dataset = write(
        tmp_path / "d",
        documents,
        tokenizer=tokenizer,
        compression=compression,
        batch_tokens=100,
        shard_bytes=2500,
    )
    assert len(dataset.manifest.shards) > 1
    assert len(dataset.manifest.shards[0].batches) > 1
    assert dataset.total_tokens == sum(LENGTHS)
    assert dataset.num_documents == len(LENGTHS)
    stored = list(dataset.documents())
    assert [d.doc_id for d in stored] == [f"doc{n}" for n in range(len(LENGTHS))]
    assert {d.source for d in stored} == {"test"}
    assert {d.tokens.dtype for d in stored} == {
        np.dtype(np.uint16 if tokenizer.vocab_size < 65537 else np.uint32)
    }
    for document, read in zip(documents, stored, strict=True):
        np.testing.assert_array_equal(document, read.tokens)
    assert verify(tmp_path / "d").total_tokens == dataset.total_tokens
    assert not (tmp_path / "d.tmp").exists()


def test_arrow_reads_the_files_and_agrees_on_offsets(tmp_path):
    dataset = write(tmp_path / "d", random_documents(LENGTHS), batch_tokens=100)
    (shard,) = dataset.manifest.shards
    with pa.ipc.open_file(str(tmp_path / "d" / shard.file)) as reader:
        table = reader.read_all()
        assert reader.num_record_batches == len(shard.batches)
    assert table.column("doc_id").to_pylist() == [f"doc{n}" for n in range(len(LENGTHS))]
    assert [len(row) for row in table.column("tokens").to_pylist()] == LENGTHS


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), data=st.data())
def test_read_any_range(tmp_path_factory, lengths, data):
    folder = tmp_path_factory.mktemp("read")
    documents = random_documents(lengths)
    dataset = write(folder / "d", documents, batch_tokens=50, shard_bytes=400)
    stream = np.concatenate(documents)
    firsts = np.cumsum([0, *lengths[:-1]])
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    tokens, boundaries, _ = dataset.read(start, stop)
    np.testing.assert_array_equal(tokens, stream[start:stop])
    assert boundaries.tolist() == [f - start for f in firsts if start <= f < stop]


def test_uncompressed_reads_are_views_and_read_only(tmp_path):
    dataset = write(tmp_path / "d", random_documents([1000]))
    tokens, _, _ = dataset.read(10, 500)
    assert tokens.base is not None
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
    with pytest.raises(IndexError):
        dataset.read(0, 1001)


def test_opening_reads_no_shard(tmp_path):
    folder = tmp_path / "d"
    file = folder / write(folder, random_documents(LENGTHS)).manifest.shards[0].file
    file.write_bytes(bytes(file.stat().st_size))  # same size, all zeros
    dataset = Dataset(folder)
    with pytest.raises(DataError, match="record batch 0 is corrupt"):
        dataset.read(0, 10)


def test_open_batches_stay_bounded(tmp_path):
    dataset = write(tmp_path / "d", random_documents([10] * 600), batch_tokens=10, shard_bytes=600)
    assert len(dataset.manifest.shards) > 100
    read_everything(dataset)
    assert dataset._block.cache_info().currsize <= 256
    assert dataset._map.cache_info().currsize <= 64


def test_writer_refuses(tmp_path):
    with ShardWriter(tmp_path / "d", ByteTokenizer()) as writer:
        with pytest.raises(DataError, match=r"document 'x': token 257 at 1 is not in \[0, 257\)"):
            writer.write("x", "s", np.array([1, 257]))
        with pytest.raises(DataError, match="token -1 at 0"):
            writer.write("x", "s", np.array([-1, 5]))
        with pytest.raises(DataError, match="document 'x': tokens are"):
            writer.write("x", "s", np.array([], dtype=np.int64))
        with pytest.raises(DataError, match="document 'x': tokens are float64"):
            writer.write("x", "s", np.array([1.0]))
        with pytest.raises(DataError, match="2147483647"):
            writer.write("x", "s", np.broadcast_to(np.uint16(1), 2**31))
        with pytest.raises(DataError, match="4096"):
            writer.write("i" * 5000, "s", np.array([1]))
        writer.write("ok", "s", np.array([1, 256]))
    with pytest.raises(DataError, match="already there"), ShardWriter(tmp_path / "d", ByteTokenizer()):
        pass
    assert Dataset(tmp_path / "d").num_documents == 1
    with pytest.raises(DataError, match="nothing was written"), ShardWriter(tmp_path / "e", ByteTokenizer()):
        pass
    with pytest.raises(DataError, match="compression='gzip'"):
        ShardWriter(tmp_path / "f", ByteTokenizer(), compression="gzip")
    assert sorted(os.listdir(tmp_path)) == ["d"]


def test_a_document_may_exceed_a_batch(tmp_path):
    dataset = write(tmp_path / "d", random_documents([3, 5000, 3]), batch_tokens=100)
    assert dataset.manifest.shards[0].batches[:, manifest_module.TOKENS].tolist() == [3, 5000, 3]


def test_an_exception_leaves_nothing(tmp_path):
    def broken() -> None:
        with ShardWriter(tmp_path / "d", ByteTokenizer()) as writer:
            writer.write("a", "s", np.array([1, 256]))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megalite.data.writer._ShardFile._append", full)
    with (
        pytest.raises(DataError, match="No space left on device; check space"),
        ShardWriter(tmp_path / "d", ByteTokenizer()) as writer,
    ):
        writer.write("a", "s", np.array([1, 256]))
    assert os.listdir(tmp_path) == []


def test_leftovers_of_a_killed_writer_are_cleared_but_nothing_else(tmp_path):
    (tmp_path / "d.tmp").mkdir()
    (tmp_path / "d.tmp" / "shard_00000.arrow").write_bytes(b"half")
    write(tmp_path / "d", random_documents([4]))
    (tmp_path / "e.tmp").mkdir()
    (tmp_path / "e.tmp" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"thesis\.txt is in the way"):
        write(tmp_path / "e", random_documents([4]))
    assert (tmp_path / "e.tmp" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_flipped_bits_are_never_silent(tmp_path, compression):
    folder = tmp_path / "d"
    original = write(
        folder, random_documents(LENGTHS * 3), compression=compression, batch_tokens=400, shard_bytes=3000
    )
    expected = read_everything(original)
    documents = [(d.doc_id, d.source) for d in original.documents()]
    files = sorted(path for path in folder.iterdir())
    assert len(files) >= 4
    rng = random.Random(1)
    messages: list[str] = []
    for _ in range(200):
        path = rng.choice(files)
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            found = Dataset(folder)
            for ours, theirs in zip(read_everything(found), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)
            assert [(d.doc_id, d.source) for d in found.documents()] == documents
            assert found.tokenizer == original.tokenizer
        except DataError as error:
            messages.append(str(error))
        if path.suffix == ".arrow":  # bytes that reading does not use are still seen by verify
            with pytest.raises(DataError):
                verify(folder)
        path.write_bytes(good)
    assert len(messages) > 120
    assert not any("\n" in message for message in messages)
    verify(folder)


def test_missing_truncated_and_swapped_files(tmp_path):
    folder = tmp_path / "d"
    dataset = write(folder, random_documents([50] * 8), batch_tokens=50, shard_bytes=400)
    first, second = (folder / shard.file for shard in dataset.manifest.shards[:2])
    size = first.stat().st_size
    assert size == second.stat().st_size
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    with pytest.raises(DataError, match=r"shard_00000\.arrow: record batch 0 is corrupt: CRC"):
        Dataset(folder).read(0, 10)
    with pytest.raises(DataError, match=r"shard_00000\.arrow"):
        verify(folder)
    os.truncate(first, size - 8)
    with pytest.raises(DataError, match=rf"shard_00000\.arrow has {size - 8} bytes, expected {size}"):
        Dataset(folder)
    first.unlink()
    with pytest.raises(DataError, match=r"shard_00000\.arrow is missing"):
        Dataset(folder)


def test_no_dataset(tmp_path):
    with pytest.raises(DataError, match="no dataset folder"):
        Dataset(tmp_path / "nowhere")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"holds no manifest\.json; did you mean .*train"):
        Dataset(tmp_path)


@pytest.mark.parametrize(
    "name", ["../secret.arrow", "/etc/passwd", "a/b.arrow", "..", ".hidden", "", "c:\\x", "x\0y", "ü.arrow"]
)
def test_no_path_leaves_the_folder(tmp_path, name):
    folder = tmp_path / "d"
    write(folder, random_documents([50]))
    shutil.copy(folder / "shard_00000.arrow", tmp_path / "secret.arrow")
    edit_manifest(folder, lambda content: content["shards"][0].update(file=name))
    with pytest.raises(DataError, match=r"shards\[0\]\.file is .*; expected a plain file name"):
        Dataset(folder)


@pytest.mark.parametrize("name", ["shard_00000.arrow", "tokenizer.json", "manifest.json"])
def test_no_link_leaves_the_folder(tmp_path, name):
    folder = tmp_path / "d"
    write(folder, random_documents([50]))
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="links out of"):
        Dataset(folder)


def test_a_pipe_is_not_a_shard(tmp_path):
    folder = tmp_path / "d"
    write(folder, random_documents([50]))
    (folder / "shard_00000.arrow").unlink()
    os.mkfifo(folder / "shard_00000.arrow")
    with pytest.raises(DataError, match="not a regular file"):
        Dataset(folder)


def _set(*path_and_value):
    *path, key, value = path_and_value

    def change(content):
        for part in path:
            content = content[part]
        content[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", "other"), 'format is "other"'),
        (_set("version", 2), "version is 2; this megalite reads version 1"),
        (_set("dtype", "uint32"), 'dtype is "uint32" but its parts make uint16'),
        (_set("tokens", 49), "tokens is 49 but its parts make 50"),
        (_set("documents", True), "documents is true"),
        (_set("version", True), "version is true"),
        (_set("compression", "lzma"), 'compression is "lzma"'),
        (_set("shards", {}), "shards is {}; expected a list"),
        (_set("shards", []), "documents is 1 but its parts make 0"),
        (_set("shards", 0, 7), "shards.0. is 7"),
        (_set("shards", 0, "bytes", -1), r"shards\[0\].bytes is -1"),
        (_set("shards", 0, "bytes", "9"), r"shards\[0\].bytes is \"9\""),
        (_set("shards", 0, "batches", "tokens", [1, 2]), "columns of lengths"),
        (_set("shards", 0, "batches", "tokens", [2**31]), "out of range"),
        (_set("shards", 0, "batches", "tokens", [1e300]), "not an integer"),
        (_set("shards", 0, "batches", "offset", [2**52]), "reach beyond"),
        (_set("shards", 0, "batches", "documents", [51]), "out of range"),
        (_set("tokenizer", "vocab_size", 200), "eos_id=256 is not below vocab_size=200"),
        (_set("tokenizer", "kind", None), "tokenizer.kind is null; expected a string"),
        (_set("tokenizer", "fingerprint", "0" * 64), "not the tokenizer of this dataset"),
        (_set("tokenizer", "eos_id", 255), "not the tokenizer of this dataset"),
        (lambda content: content.pop("tokenizer"), "key tokenizer is missing"),
        (lambda content: content["shards"].append(content["shards"][0]), "but its parts make"),
    ],
)
def test_manifest_is_checked(tmp_path, change, message):
    folder = tmp_path / "d"
    write(folder, random_documents([50]))
    edit_manifest(folder, change)
    with pytest.raises(DataError, match=message):
        Dataset(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"format": NaN}', "\0"])
def test_manifest_that_is_no_manifest(tmp_path, text):
    folder = tmp_path / "d"
    write(folder, random_documents([50]))
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        Dataset(folder)


def test_edited_manifest_without_new_crc(tmp_path):
    folder = tmp_path / "d"
    write(folder, random_documents([50]))
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 257', '"vocab_size": 258'))
    with pytest.raises(DataError, match="changed after it was written"):
        Dataset(folder)


def message_of(offsets: list[int], values: list[int]) -> bytes:
    """A record batch message with these bytes as document offsets, whatever they say."""
    schema = shard_schema(np.dtype(np.uint16))
    rows = len(offsets) - 1
    honest = [*range(rows), len(values)]
    documents = [values[start:stop] for start, stop in itertools.pairwise(honest)]
    lists = pa.array(documents, schema.field("tokens").type)
    ids = pa.array(["x"] * rows)
    data = bytearray(pa.RecordBatch.from_arrays([lists, ids, ids], schema=schema).serialize().to_pybytes())
    body = 8 + int.from_bytes(data[4:8], "little")  # begins with the offsets: there is no validity bitmap
    assert np.frombuffer(data, np.int32, rows + 1, body).tolist() == honest
    data[body : body + 4 * (rows + 1)] = np.array(offsets, dtype=np.int32).tobytes()
    return bytes(data)


def hostile(folder: Path, message: bytes, documents: int, tokens: int) -> Dataset:
    """A dataset whose only record batch is `message`, with a CRC that matches."""
    write(folder, random_documents([tokens]))
    (folder / "shard_00000.arrow").write_bytes(message)

    def change(content):
        size, crc = len(message), zlib.crc32(message)
        row = {"offset": 0, "bytes": size, "crc32": crc, "documents": documents, "tokens": tokens}
        columns = {key: [value] for key, value in row.items()}
        shard = {"file": "shard_00000.arrow", "bytes": size, "crc32": crc, "batches": columns}
        content.update(shards=[shard], documents=documents)

    edit_manifest(folder, change)
    return Dataset(folder)


@pytest.mark.parametrize(
    ("offsets", "values"),
    [
        ([0, 2**31 - 1], [1, 2, 3, 4]),
        ([0, -5], [1, 2, 3, 4]),
        ([-3, 4], [1, 2, 3, 4]),
        ([0, 3, 1], [1, 2, 3, 4]),
        ([0, 2], [1, 2, 3, 4]),  # tokens that belong to no document
        ([1, 4], [1, 2, 3, 4]),
        ([0, 2, 2, 4], [1, 2, 3, 4]),  # an empty document
        ([0, 4], [1, 2, 3, 257]),  # beyond the vocabulary
        ([0, 3], [1, 2, 3]),  # fewer than the manifest says
    ],
)
def test_hostile_batches_with_a_matching_crc(tmp_path, offsets, values):
    dataset = hostile(tmp_path / "d", message_of(offsets, values), len(offsets) - 1, 4)
    with pytest.raises(DataError, match="record batch 0 is not what the manifest says"):
        dataset.read(0, 4)


def test_the_same_batch_with_honest_offsets_is_read(tmp_path):
    tokens, boundaries, _ = hostile(tmp_path / "d", message_of([0, 1, 4], [1, 2, 3, 4]), 2, 4).read(0, 4)
    assert (tokens.tolist(), boundaries.tolist()) == ([1, 2, 3, 4], [0, 1])


def test_random_bytes_with_a_matching_crc(tmp_path):
    rng = random.Random(3)
    message = message_of([0, 2, 4], [1, 2, 3, 4])
    for n in range(60):
        bad = bytearray(message)
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        dataset = hostile(tmp_path / f"d{n}", bytes(bad), 2, 4)
        try:
            tokens, boundaries, _ = dataset.read(0, 4)
        except DataError:
            continue
        assert tokens.size == 4
        assert tokens.max() < 257
        assert boundaries[0] == 0
        assert list(dataset.documents())


def test_declared_sizes_are_capped(tmp_path):
    dataset = write(tmp_path / "d", random_documents([50_000]), compression="zstd")
    shard = dataset.manifest.shards[0]
    row = shard.batches[0]
    data = bytearray((tmp_path / "d" / shard.file).read_bytes()[row[0] : row[0] + row[1]])
    message = pa.ipc.read_message(pa.py_buffer(bytes(data)))
    check_declared_size(message, dataset.manifest, 1, 50_000)
    with pytest.raises(ValueError, match="bytes after decompression"):
        check_declared_size(message, dataset.manifest, 1, 10)
    plain = write(tmp_path / "p", random_documents([5000])).manifest
    with pytest.raises(ValueError, match="compressed, though"):
        check_declared_size(message, plain, 1, 5000)
    # The token buffer's length prefix is the one that says 100,000 bytes; make it ask for 2^60.
    at = data.index((100_000).to_bytes(8, "little"))
    data[at : at + 8] = (2**60).to_bytes(8, "little")
    bomb = pa.ipc.read_message(pa.py_buffer(bytes(data)))
    with pytest.raises(ValueError, match="bytes after decompression"):
        check_declared_size(bomb, dataset.manifest, 1, 50_000)
