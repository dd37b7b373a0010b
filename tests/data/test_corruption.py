"""Damage by accident: a flipped bit, a cut or swapped file is found, or provably changes nothing."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from megalite.data.shards import CorruptBlockError, Dataset
from megalite.errors import DataError
from tests.daily import one_a_day

from .datasets import random_documents, verify, write

LENGTHS = [5, 1, 90, 1, 1, 40, 7, 900, 12, 64] * 3
FLIPS = 250  # of each way of compression: 1,000 in all


def observed(dataset: Dataset) -> list[object]:
    """All that a user can get from a dataset."""
    tokens, boundaries, mask = dataset.read(0, dataset.total_tokens)
    names = [(d.doc_id, d.source) for d in dataset.documents()]
    return [tokens.tolist(), boundaries.tolist(), mask.tolist(), names, dataset.tokenizer]


@pytest.mark.slow
@pytest.mark.parametrize("compression", [None, "lz4", "zstd", "zstd-shard"])
def test_flipped_bits_are_never_silent(tmp_path, compression, monkeypatch):
    folder = tmp_path / "d"
    spans = [[(0, 1)] if n < 4 else [(1, 3), (3, n)] for n in LENGTHS]
    options = {"compression": compression, "batch_tokens": 400, "shard_bytes": 6000, "spans": spans}
    original = write(folder, random_documents(LENGTHS), **options)
    expected = observed(original)
    files = sorted(folder.iterdir())
    assert len(files) >= 4
    rng = random.Random(1)
    found = unseen = 0
    for flip in range(FLIPS):
        monkeypatch.setenv("MEGALITE_CACHE", str(tmp_path / f"cache{flip}"))
        path = rng.choice(files)
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            assert observed(Dataset(folder)) == expected
            unseen += 1
        except DataError as error:
            assert "\n" not in str(error)
            found += 1
        if ".arrow" in path.name:  # bytes that reading does not use are still seen by verify
            with pytest.raises(DataError, match=path.name):
                verify(folder)
        path.write_bytes(good)
    assert found + unseen == FLIPS
    assert found > 0.7 * FLIPS
    verify(folder)


@pytest.mark.parametrize("compression", one_a_day(None, "zstd", "zstd-shard"))
def test_cut_files_are_found(tmp_path, compression, monkeypatch):
    folder = tmp_path / "d"
    write(folder, random_documents(LENGTHS), compression=compression, batch_tokens=400, shard_bytes=3000)
    rng = random.Random(2)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for size in [0, 1, len(good) - 1, *(rng.randrange(len(good)) for _ in range(6))]:
            monkeypatch.setenv("MEGALITE_CACHE", str(tmp_path / f"cache-{path.name}-{size}"))
            path.write_bytes(good[:size])
            with pytest.raises(DataError, match=path.name):
                verify(folder)
            with pytest.raises(DataError, match=path.name):
                list(Dataset(folder).documents())
        path.write_bytes(good)
    verify(folder)


def test_missing_longer_and_swapped_files(tmp_path):
    folder = tmp_path / "d"
    dataset = write(folder, random_documents([50] * 8), batch_tokens=50, shard_bytes=600)
    first, second = (folder / shard.file for shard in dataset.manifest.shards[:2])
    size = first.stat().st_size
    assert size == second.stat().st_size
    swap(first, second)
    with pytest.raises(CorruptBlockError, match=r"shard_00000\.arrow: record batch 0 is corrupt: CRC"):
        Dataset(folder).read(0, 10)
    with pytest.raises(DataError, match=r"shard_00000\.arrow"):
        verify(folder)
    swap(first, second)
    with first.open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=rf"shard_00000\.arrow has {size + 4} bytes, expected {size}"):
        Dataset(folder).read(0, 10)
    first.unlink()
    with pytest.raises(DataError, match=r"shard_00000\.arrow is missing"):
        Dataset(folder).read(0, 10)
    assert Dataset(folder).read(50, 60).tokens.size == 10  # the other shards are there
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        Dataset(folder)


def swap(first: Path, second: Path) -> None:
    os.rename(first, f"{first}.aside")
    os.rename(second, first)
    os.rename(f"{first}.aside", second)


@pytest.mark.parametrize("compression", [None, "zstd", "zstd-shard"])
def test_a_bad_block_is_named_and_the_others_are_read(tmp_path, compression):
    folder = tmp_path / "d"
    documents = random_documents([100] * 12)
    dataset = write(folder, documents, batch_tokens=200, compression=compression)
    (shard,) = dataset.manifest.shards
    path = folder / shard.file
    data = bytearray(path.read_bytes())
    if compression == "zstd-shard":
        data[0] ^= 1
    else:
        offset, size = shard.batches[2, :2].tolist()
        data[offset + size - 30] ^= 1
    path.write_bytes(data)
    damaged = Dataset(folder)
    bad = range(6) if compression == "zstd-shard" else [2]  # one stream, so all that it holds
    for number in range(damaged.num_blocks):
        if number not in bad:
            assert damaged.block(number).tokens.tolist() == dataset.block(number).tokens.tolist()
            continue
        for _ in range(2):
            with pytest.raises(CorruptBlockError) as caught:
                damaged.block(number)
        assert (caught.value.file, caught.value.batch, caught.value.block) == (str(path), number, number)
        assert "CRC" in caught.value.reason or "cannot be read" in caught.value.reason


def test_a_damaged_copy_is_made_again(tmp_path):
    folder = tmp_path / "d"
    documents = random_documents([100] * 12)
    first = write(folder, documents, batch_tokens=200, compression="zstd-shard")
    first.block(0)
    (copy,) = Path(os.environ["MEGALITE_CACHE"]).glob("*.arrow")
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    np.testing.assert_array_equal(Dataset(folder).read(0, 1200).tokens, np.concatenate(documents))
