"""Datasets in buckets: s3 through s3fs from moto, gs through gcsfs from an emulator of what it asks."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megalite.data import remote
from megalite.data.cache import ShardCache
from megalite.data.loader import Share
from megalite.data.shards import Dataset
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import DataError

from .datasets import loader, megalite, random_documents, read_everything, verify, write
from .stores import BUCKET, S3, Gcs, Store

DOCUMENTS = random_documents([1000] * 40)
STREAM = np.concatenate(DOCUMENTS)
CHUNK = 8192  # of a read, in these tests: several for each of the shards of 20 kB


@pytest.fixture(scope="module", params=[S3, Gcs], ids=lambda kind: kind.scheme)
def bucket(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with the datasets `plain`, `zstd` and `packed`, the last one of `.arrow.zst`."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param is S3:
            for package in ("s3fs", "boto3", "moto", "flask_cors"):
                pytest.importorskip(package, reason=f"S3 is tested with s3fs and moto; {package} is missing")
        else:
            # What zonal buckets need is asked through gRPC, which nothing here emulates.
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            pytest.importorskip("gcsfs", reason="Google's storage is tested with gcsfs, which is missing")
        store: Store = request.param()
        folder = tmp_path_factory.mktemp("store")
        for name, compression in (("plain", None), ("zstd", "zstd"), ("packed", "zstd-shard")):
            options = {"batch_tokens": 2000, "shard_bytes": 25_000, "compression": compression}
            write(folder / name, DOCUMENTS, **options)
            store.upload(folder / name)
        store.folder = folder
        yield store
        store.close()


@pytest.fixture
def store(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The store, sound, with pauses short enough for a test and clients that know nothing of before."""
    import fsspec

    for key, value in bucket.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)
    monkeypatch.setattr(remote, "CHUNK_BYTES", CHUNK)
    if bucket.scheme == "gs":  # its client has pauses of its own
        hasty = SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 1000))
        monkeypatch.setattr("gcsfs.retry.asyncio", hasty)
    bucket.faults.clear()
    bucket.reads.clear()
    yield bucket
    fsspec.get_filesystem_class(bucket.scheme).clear_instance_cache()
    for name in ("plain", "packed"):
        bucket.upload(bucket.folder / name)


def address(store: Store, name: str) -> str:
    return f"{store.scheme}://{BUCKET}/{name}"


def cached() -> list[str]:
    """What the cache holds, finished or not."""
    folder = Path(os.environ["MEGALITE_CACHE"])
    return sorted(path.name.partition("-")[2] for path in folder.glob("*-*"))


@pytest.mark.parametrize("name", ["plain", "zstd", "packed"])
def test_a_dataset_in_a_bucket(store, name, capsys):
    url = address(store, name)
    dataset = Dataset(url)
    assert store.reads == {"manifest.json": 1, "tokenizer.json": 1}
    np.testing.assert_array_equal(read_everything(dataset)[0], STREAM)
    sizes = {shard.file: shard.bytes for shard in dataset.manifest.shards}
    assert len(sizes) > 1
    # Each byte once, in ranges.
    assert {file: store.reads[file] for file in sizes} == {f: -(-s // CHUNK) for f, s in sizes.items()}
    assert verify(url).total_tokens == STREAM.size
    if name != "packed":  # whose files are not in the cache as they are stored
        assert sum(store.reads[file] for file in sizes) == sum(-(-s // CHUNK) for s in sizes.values())
    assert load_tokenizer(url).fingerprint == dataset.tokenizer.fingerprint
    assert megalite("data", "show", url, "--seq-len", "64") == 0
    assert megalite("data", "stats", url) == 0
    assert "40,000" in capsys.readouterr().out


@pytest.mark.slow
def test_batches_are_those_of_the_same_files_on_disk(store, tmp_path):
    """A mixture, continued in the middle, through a cache that holds half of it; fetching ahead competes."""
    settings = {"sources": [{"weight": 0.7}, {"weight": 0.3}], "shuffle_chunks": 2}
    cache = ShardCache(tmp_path / "small", max_bytes=90_000)
    far = [Dataset(address(store, name), cache=cache) for name in ("plain", "packed")]
    near = [Dataset(store.folder / name) for name in ("plain", "packed")]
    share = Share(16, 8)
    for position in (0, 16 * 7):
        batches = [loader(sets, 100, **settings).steps(position, share) for sets in (far, near)]
        with batches[0] as ours, batches[1] as theirs:
            for _ in range(4):
                for mine, other in zip(next(ours), next(theirs), strict=True):
                    np.testing.assert_array_equal(mine.tokens, other.tokens)
                    np.testing.assert_array_equal(mine.labels, other.labels)
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 90_000


READ = """
import sys
from megalite.data.shards import Dataset
dataset = Dataset(sys.argv[1])
print(dataset.read(0, dataset.total_tokens).tokens.sum(dtype="int64"))
"""


# The cache is the same for every store.
@pytest.mark.slow
@pytest.mark.parametrize("bucket", [S3], ids=["s3"], indirect=True)
def test_two_processes_fetch_each_shard_once(store):
    url = address(store, "packed")
    command = [sys.executable, "-c", READ, url]
    store.faults = {"shard_00000.arrow.zst": ["reset", 503]}
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == [f"{STREAM.sum()}\n"] * 2
    shards = Dataset(url).manifest.shards
    assert [store.reads[shard.file] for shard in shards] == [3, *[1] * (len(shards) - 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "packed"])
def test_a_store_that_fails_and_recovers(store, name, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE_S", 1)
    suffix = ".arrow.zst" if name == "packed" else ".arrow"
    store.faults = {
        "manifest.json": [503, "cut"],
        f"shard_00000{suffix}": [503, "cut", "reset", 500],
        f"shard_00001{suffix}": ["silence"],
    }
    np.testing.assert_array_equal(read_everything(Dataset(address(store, name)))[0], STREAM)
    assert not any(store.faults.values())


@pytest.mark.slow
def test_a_store_that_stays_down(store, monkeypatch):
    dataset = Dataset(address(store, "plain"))
    attempts = 6
    if store.scheme == "gs":  # each of ours is six of its client's, which takes it half a minute
        attempts = 12
        monkeypatch.setattr(remote, "PATIENCE_S", 0)
    store.faults["shard_00001.arrow"] = [503] * 99
    expected = (
        rf"cannot read {dataset.path}/shard_00001\.arrow after \d attempts: .*; check the address and the"
    )
    with pytest.raises(DataError, match=expected):
        dataset.block(7)
    assert cached() == []
    assert store.reads["shard_00001.arrow"] == attempts
    store.faults.clear()
    assert dataset.block(7).tokens.size == 2000


@pytest.mark.slow
@pytest.mark.parametrize("status", [400, 403])
def test_what_is_refused_is_asked_once(store, status, capfd):
    dataset = Dataset(address(store, "plain"))
    store.faults["shard_00001.arrow"] = [None, status, *[503] * 99]  # in the middle
    with pytest.raises(DataError, match=r"read .*shard_00001\.arrow: .*; check .* they allow reading"):
        dataset.block(7)
    assert store.reads["shard_00001.arrow"] == 2
    assert cached() == []
    assert capfd.readouterr().err == ""


def test_objects_that_are_not_there(store):
    url = address(store, "plain")
    dataset = Dataset(url)
    store.faults["shard_00001.arrow"] = [None, lambda: store.remove("plain/shard_00001.arrow")]
    with pytest.raises(DataError, match=rf"cannot read {url}/shard_00001\.arrow: FileNotFoundError"):
        dataset.block(7)  # it vanishes while it is read
    assert cached() == []
    for missing in (address(store, "nowhere"), f"{store.scheme}://no-such-bucket/plain"):
        with pytest.raises(
            DataError, match=rf"{missing}/manifest\.json: FileNotFoundError.*its manifest\.json"
        ):
            Dataset(missing)


@pytest.mark.slow
def test_objects_that_change(store):
    url = address(store, "plain")
    dataset = Dataset(url)
    key = "plain/shard_00001.arrow"
    good = (store.folder / key).read_bytes()

    def spoil():
        store.put(key, bytes(len(good)))

    # Others' bytes in the middle of a read, which then are put right: what comes out is right.
    store.faults["shard_00001.arrow"] = [None, spoil, None, lambda: store.put(key, good)]
    np.testing.assert_array_equal(dataset.block(7).tokens, STREAM[14_000:16_000])
    store.put("plain/shard_00002.arrow", good[:-1])
    store.reads.clear()
    with pytest.raises(DataError, match=r"shard_00002\.arrow has \d+ bytes, expected \d+; restore the file"):
        dataset.block(12)
    assert store.reads["shard_00002.arrow"] == 0  # the store says so before it is read


# Without any gcsfs reads as nobody, and is refused as in `test_what_is_refused_is_asked_once`.
@pytest.mark.parametrize("bucket", [S3], ids=["s3"], indirect=True)
@pytest.mark.parametrize(("profile", "error"), [(None, "NoCredentialsError"), ("nobody", "ProfileNotFound")])
def test_credentials_that_are_missing(store, profile, error, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    if profile:
        monkeypatch.setenv("AWS_PROFILE", profile)
    with pytest.raises(DataError, match=rf"s3://bucket/plain/manifest\.json: {error}: .*credentials"):
        Dataset(address(store, "plain"))
