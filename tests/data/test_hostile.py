"""Damage on purpose: files made to crash a reader, to fill its memory or to lead it elsewhere are refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from megalite.data.ipc import REFUSALS, check_declared_size, decode, shard_schema
from megalite.data.manifest import Manifest, TokenizerInfo
from megalite.data.shards import CorruptBlockError, Dataset

from . import hostile
from .datasets import random_documents, verify, write


@pytest.mark.slow
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


def test_compressed_names_are_checked_when_they_are_asked_for(tmp_path):
    hostile.with_batch(hostile.NOT_UTF8, codec="zstd")(tmp_path / "d")
    block = Dataset(tmp_path / "d").block(0)
    assert block.tokens.tolist() == [1, 2, 3, 4]
    for ask in (lambda: block.doc_ids, lambda: block.sources, block.encoded_sources):
        with pytest.raises(CorruptBlockError, match="batch 0 is not what the manifest says: .*UTF8"):
            ask()
    with pytest.raises(CorruptBlockError, match="UTF8"):
        verify(tmp_path / "d")


@pytest.mark.parametrize("codec", [None, "zstd", "lz4"])
def test_changed_bytes_with_a_matching_crc(codec):
    """What decoding is left with when a CRC vouches for the bytes: refuse, or give arrays that are right."""
    schema = shard_schema(np.dtype(np.uint16), has_loss_mask=True)
    values = {"tokens": [[1, 2, 3, 4] * 40, [5, 6]], "doc_id": ["abc", "d"], "source": ["x", "y"]}
    masks = {"loss_mask": [[0, 1, 2, 4], []]}
    good = hostile.serialized(pa.RecordBatch.from_pydict(values | masks, schema=schema), codec)
    head = 8 + int.from_bytes(good[4:8], "little")  # where the structure is described
    manifest = Manifest(TokenizerInfo("byte", "", 257, 256), codec, (), has_loss_mask=True)
    rng, refused = random.Random(3), 0
    for _ in range(1500):
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            bad[rng.randrange(head if rng.random() < 0.7 else len(bad))] ^= 1 << rng.randrange(8)
        try:
            parts = decode(pa.py_buffer(bytes(bad)), schema, manifest, 2, 162, is_checked=False)
            names = parts.names()
        except REFUSALS:
            refused += 1
            continue
        assert parts.tokens.size == parts.loss_mask.size == 162
        assert parts.tokens.max() < 257
        assert parts.offsets[0] == 0 < parts.offsets[1] < parts.offsets[2] == 162
        assert len(names.to_pylist()) == 2
    assert 700 < refused < 1500


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
