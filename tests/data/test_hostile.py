"""Damage on purpose: files made to crash a reader, to fill its memory or to lead it elsewhere are refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pyarrow as pa
import pytest

from megalite.data.ipc import check_declared_size
from megalite.data.shards import CorruptBlockError, Dataset
from megalite.errors import DataError

from . import hostile
from .datasets import random_documents, write


def test_crafted_datasets_are_refused_in_little_memory_and_time(tmp_path):
    names = hostile.build(tmp_path)
    command = [sys.executable, "-m", "tests.data.hostile", str(tmp_path)]
    reader = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    outcomes = [json.loads(line) for line in reader.stdout.splitlines()]
    assert len(names) == len(outcomes) >= 60
    expected = {name: "read 1048626 tokens" if name in hostile.HONEST else "refused" for name in names}
    assert {name: outcome for name, (outcome, _) in zip(names, outcomes, strict=True)} == expected
    assert {name: s for name, (_, s) in zip(names, outcomes, strict=True) if s > 1} == {}


def test_what_the_crafted_datasets_are_made_of_is_read_when_honest(tmp_path):
    """Otherwise they might be refused for a reason that has nothing to do with the lie."""
    hostile.with_offsets([0, 1, 4])(tmp_path / "offsets")
    span = Dataset(tmp_path / "offsets").read(0, 4)
    assert (span.tokens.tolist(), span.boundaries.tolist()) == ([1, 2, 3, 4], [0, 1])
    hostile.with_spans([0, 1, 2, 4], [1, 2])(tmp_path / "spans")
    assert Dataset(tmp_path / "spans").read(0, 8).loss_mask.astype(int).tolist() == [1, 0, 1, 1, 0, 1, 0, 0]
    for codec in ("zstd", "lz4"):
        hostile.with_declared(codec, 100_000)(tmp_path / codec)
        assert Dataset(tmp_path / codec).block(0).tokens.tolist() == [7] * 50_000
    hostile.with_zstd(hostile.zstandard.compress)(tmp_path / "shard")
    assert Dataset(tmp_path / "shard").block(0).tokens.size == 50
    columns = {"tokens": pa.array([[1, 2, 3, 4]], hostile.LIST_U16), "doc_id": hostile.X, "source": hostile.X}
    hostile.with_batch(columns)(tmp_path / "batch")
    assert Dataset(tmp_path / "batch").block(0).tokens.tolist() == [1, 2, 3, 4]


def test_the_reason_is_named(tmp_path):
    hostile.with_offsets([0, 3, 1])(tmp_path / "d")
    with pytest.raises(CorruptBlockError, match="record batch 0 is not what the manifest says"):
        Dataset(tmp_path / "d").block(0)
    hostile.with_zstd(hostile.wide_window)(tmp_path / "w")
    with pytest.raises(CorruptBlockError, match="cannot be read: its zstd stream is damaged: .*memory"):
        Dataset(tmp_path / "w").block(0)
    hostile.with_zstd(hostile.zeros_packed)(tmp_path / "z")
    with pytest.raises(CorruptBlockError, match="unpacks to more than the .* bytes expected"):
        Dataset(tmp_path / "z").block(0)


def test_random_bytes_with_a_matching_crc(tmp_path):
    rng = random.Random(3)
    message = hostile.message_of([0, 2, 4], [1, 2, 3, 4])
    for n in range(60):
        bad = bytearray(message)
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        hostile.with_message(tmp_path / f"d{n}", bytes(bad), 2, 4)
        dataset = Dataset(tmp_path / f"d{n}")
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
    data = (tmp_path / "d" / shard.file).read_bytes()[row[0] : row[0] + row[1]]
    message = pa.ipc.read_message(pa.py_buffer(data))
    check_declared_size(message, dataset.manifest, 1, 50_000)
    with pytest.raises(ValueError, match="bytes after decompression"):
        check_declared_size(message, dataset.manifest, 1, 10)
    plain = write(tmp_path / "p", random_documents([5000])).manifest
    with pytest.raises(ValueError, match="compressed, though"):
        check_declared_size(message, plain, 1, 5000)
