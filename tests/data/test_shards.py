"""Reading: what was written comes back, by document, by block and by any range of the stream."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data import manifest as manifest_module
from megalite.data import shards
from megalite.data.manifest import COMPRESSIONS, Manifest, ShardInfo
from megalite.data.shards import Dataset
from megalite.data.tokenizer import ByteTokenizer
from megalite.errors import DataError
from tests.daily import one_a_day

from .datasets import WideTokenizer, random_documents, read_everything, verify, write

LENGTHS = [5, 1, 90, 1, 1, 40, 7, 900, 12, 64]


@pytest.mark.parametrize("compression", COMPRESSIONS)
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
    assert sorted({path.suffix for path in (tmp_path / "d").iterdir()}) == sorted(
        {".json", ".zst" if compression == "zstd-shard" else ".arrow"}
    )
    assert not (tmp_path / "d.tmp").exists()


def test_arrow_reads_the_files_and_agrees_on_offsets(tmp_path):
    dataset = write(tmp_path / "d", random_documents(LENGTHS), batch_tokens=100)
    (shard,) = dataset.manifest.shards
    with pa.ipc.open_file(str(tmp_path / "d" / shard.file)) as reader:
        table = reader.read_all()
        assert reader.num_record_batches == len(shard.batches)
    assert table.column("doc_id").to_pylist() == [f"doc{n}" for n in range(len(LENGTHS))]
    assert [len(row) for row in table.column("tokens").to_pylist()] == LENGTHS


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), data=st.data())
def test_read_any_range(tmp_path_factory, lengths, data):
    folder = tmp_path_factory.mktemp("read")
    documents = random_documents(lengths)
    spans = [
        sorted(data.draw(st.sets(st.integers(0, n), max_size=6)))[: None if has_mask else 0]
        for has_mask in [data.draw(st.booleans())]
        for n in lengths
    ]
    spans = [list(zip(s[::2], s[1::2], strict=False)) for s in spans]
    dataset = write(folder / "d", documents, spans=spans, batch_tokens=50, shard_bytes=600)
    stream = np.concatenate(documents)
    firsts = np.cumsum([0, *lengths[:-1]])
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    tokens, boundaries, mask = dataset.read(start, stop)
    np.testing.assert_array_equal(tokens, stream[start:stop])
    assert boundaries.tolist() == [f - start for f in firsts if start <= f < stop]
    expected = np.zeros(len(stream), dtype=bool)
    for first, document in zip(firsts, spans, strict=True):
        for begin, end in document:
            expected[first + begin : first + end] = True
    np.testing.assert_array_equal(mask, expected[start:stop])


def test_blocks_are_the_stream(tmp_path):
    documents = random_documents(LENGTHS)
    dataset = write(tmp_path / "d", documents, batch_tokens=100, shard_bytes=2500)
    blocks = [dataset.block(n) for n in range(dataset.num_blocks)]
    assert dataset.num_blocks > 3
    assert [b.tokens.size for b in blocks] == np.diff(dataset.block_ends, prepend=0).tolist()
    np.testing.assert_array_equal(np.concatenate([b.tokens for b in blocks]), np.concatenate(documents))
    assert [n for b in blocks for n in np.diff(b.offsets)] == LENGTHS
    assert [name for b in blocks for name in b.doc_ids] == [f"doc{n}" for n in range(len(LENGTHS))]
    assert all(b.loss_mask is None and set(b.sources) == {"test"} for b in blocks)
    assert blocks[0].encoded_sources()[1] == ["test"]
    for number in (-1, dataset.num_blocks):
        with pytest.raises(IndexError, match=f"block {number} of {dataset.num_blocks}"):
            dataset.block(number)


def test_uncompressed_reads_are_views_and_read_only(tmp_path):
    dataset = write(tmp_path / "d", random_documents([1000]))
    tokens, _, _ = dataset.read(10, 500)
    assert np.shares_memory(tokens, dataset.block(0).tokens)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
    with pytest.raises(IndexError):
        dataset.read(0, 1001)


def test_opening_reads_no_shard(tmp_path):
    folder = tmp_path / "d"
    file = folder / write(folder, random_documents(LENGTHS)).manifest.shards[0].file
    file.write_bytes(bytes(file.stat().st_size))  # same size, all zeros
    dataset = Dataset(folder)
    for _ in range(2):
        with pytest.raises(DataError, match="record batch 0 is corrupt"):
            dataset.read(0, 10)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_open_blocks_and_shards_stay_bounded(tmp_path, compression, monkeypatch):
    monkeypatch.setattr("megalite.data.maps.OPEN_SHARDS", 6)
    monkeypatch.setattr("megalite.data.maps.OPEN_COPIES", 4)
    monkeypatch.setattr("megalite.data.shards.OPEN_BLOCKS", 40)
    options = {"batch_tokens": 10, "shard_bytes": 2000, "compression": compression}
    documents = random_documents([10] * 80)
    dataset = write(tmp_path / "d", documents, **options)
    assert len(dataset.manifest.shards) > 10
    np.testing.assert_array_equal(read_everything(dataset)[0], np.concatenate(documents))
    assert len(dataset._open) <= 40
    place = str(tmp_path) if compression != "zstd-shard" else os.environ["MEGALITE_CACHE"]
    assert 1 < open_files(place) <= (6 if compression != "zstd-shard" else 4)
    del dataset
    assert open_files(place) == 0


def open_files(place: str) -> int:
    """How many files under `place` this process holds open."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(place) for link in links if os.path.lexists(link))


def test_unpacked_blocks_are_bounded_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("megalite.data.shards.OPEN_BLOCKS_BYTES", 5000)
    dataset = write(tmp_path / "d", random_documents([1000] * 9), batch_tokens=1000, compression="lz4")
    read_everything(dataset)
    assert len(dataset._open) == 2
    assert dataset._open_bytes == sum(size for _, size in dataset._open.values()) <= 5000


@pytest.mark.parametrize("compression", one_a_day("zstd", None, "zstd-shard"))
def test_resident_pages_of_shards_are_bounded(tmp_path, compression, monkeypatch):
    documents = random_documents([20_000] * 120)
    write(tmp_path / "d", documents, compression=compression, batch_tokens=20_000, shard_bytes=800_000)
    monkeypatch.setattr(shards, "OPEN_BLOCKS", 4)
    monkeypatch.setattr(shards, "MAPPED_BYTES", 1 << 20)
    dataset = Dataset(tmp_path / "d")
    assert sum(shard.arrow_bytes for shard in dataset.manifest.shards) > 2 << 20
    held, found = dataset.block(0).tokens, []
    for n, document in enumerate(documents):
        np.testing.assert_array_equal(dataset.block(n).tokens, document)
        if n % 5 == 0:
            found.append(resident("shard_000"))
    # The kernel may map all that was written at once along with a page: of a copy, a whole shard.
    assert max(found) < (1 << 20) + 800_000
    np.testing.assert_array_equal(held, documents[0])


def resident(name: str) -> int:
    """Bytes of memory that this process has mapped of files with such a name."""
    total, is_meant = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            is_meant = name in line
        elif key == "Rss:" and is_meant:
            total += 1024 * int(rest[0])
    return total


@pytest.mark.slow
def test_several_threads_may_read(tmp_path, monkeypatch):
    monkeypatch.setattr("megalite.data.shards.OPEN_BLOCKS", 3)
    documents = random_documents([40] * 200)
    dataset = write(tmp_path / "d", documents, batch_tokens=80, shard_bytes=5000, compression="zstd")
    stream, errors = np.concatenate(documents), []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for start in rng.integers(0, len(stream) - 100, 400).tolist():
                np.testing.assert_array_equal(
                    dataset.read(start, start + 100).tokens, stream[start : start + 100]
                )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(dataset._open) <= 3


def test_prefetch_is_a_hint(tmp_path):
    dataset = write(tmp_path / "d", random_documents([1000] * 9), batch_tokens=1000, shard_bytes=5000)
    dataset.prefetch(range(dataset.num_blocks))
    (tmp_path / "d" / dataset.manifest.shards[0].file).unlink()
    Dataset(tmp_path / "d").prefetch([0])  # the reader meets the error
    with pytest.raises(DataError, match="is missing"):
        Dataset(tmp_path / "d").block(0)


def test_no_dataset(tmp_path):
    with pytest.raises(DataError, match="no dataset folder"):
        Dataset(tmp_path / "nowhere")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"holds no manifest\.json; did you mean .*train"):
        Dataset(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("compression", "batch_tokens"), [(None, 1 << 18), ("zstd", 1 << 16)])
def test_a_hundred_billion_tokens_open_by_the_manifest_and_one_shard(tmp_path, compression, batch_tokens):
    """Of 1,600 shards only the first is here; how long it takes `benchmarks/loader.py` measures."""
    folder = tmp_path / "d"
    dataset = write(folder, random_documents([batch_tokens]), shard_bytes=1, compression=compression)
    (real,) = dataset.manifest.shards
    offset, size, crc, documents, tokens = real.batches[0].tolist()
    count = 10**11 // (1600 * tokens) + 1
    rows = [[offset + n * size, size, crc, documents, tokens] for n in range(count)]
    length = offset + count * size
    others = [
        ShardInfo(f"shard_{n:05d}.arrow", length, 12345, length, np.array(rows)) for n in range(1, 1600)
    ]
    manifest = Manifest(dataset.tokenizer, compression, (real, *others))
    (folder / "manifest.json").write_bytes(manifest_module.dump_manifest(manifest))
    opened = Dataset(folder)
    assert opened.total_tokens > 99_900_000_000
    assert opened.num_blocks == 1 + 1599 * count
    np.testing.assert_array_equal(opened.read(0, 4097).tokens, dataset.read(0, 4097).tokens)
    position = opened.total_tokens - 1
    with pytest.raises(DataError, match=r"shard_01599\.arrow is missing"):
        opened.read(position, position + 1)
