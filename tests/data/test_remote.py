"""Datasets over the network: a real HTTP server with every fault a network has, and fsspec's memory."""

from __future__ import annotations

import http.server
import io
import os
import socket
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megalite.data import remote
from megalite.data.cache import ShardCache
from megalite.data.shards import CorruptBlockError, Dataset
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import DataError

from .datasets import random_documents, read_everything, verify, write

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

DOCUMENTS = random_documents([1000] * 40)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; `server.faults` maps a name to what goes wrong at its next requests."""

    def do_GET(self):
        """Send a file, whole or with the next fault of its list."""
        name = self.path.rpartition("/")[2]
        server = self.server
        server.requests[name] += 1
        faults = server.faults.get(name, [])
        fault = faults.pop(0) if faults else ""
        if fault.isdigit():
            self.send_error(int(fault))
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = bytearray(path.read_bytes())
        if fault == "flip":
            data[len(data) // 2] ^= 4
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) // (2 if fault == "understated" else 1)))
        self.end_headers()
        if fault == "silence":
            self.wfile.write(data[: len(data) // 3])
            time.sleep(1.5)
            return
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        if fault == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of `tmp_path / "www"`, and pauses short enough for a test."""
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)
    (tmp_path / "www").mkdir()
    handler = partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.faults, server.requests = {}, Counter()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        server.root = tmp_path / "www"
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def served(server, **options: object) -> str:
    """A dataset of four shards, five blocks each, on the server."""
    write(server.root / "d", DOCUMENTS, batch_tokens=2000, shard_bytes=25_000, **options)
    return f"{server.url}/d"


@pytest.mark.parametrize("compression", [None, "zstd", "zstd-shard"])
def test_over_http(server, compression):
    url = served(server, compression=compression)
    dataset = Dataset(url)
    assert sum(server.requests.values()) == 2  # the manifest and the tokenizer
    suffix = ".arrow.zst" if compression == "zstd-shard" else ".arrow"
    np.testing.assert_array_equal(dataset.read(1500, 2500).tokens, np.concatenate(DOCUMENTS)[1500:2500])
    assert server.requests[f"shard_00000{suffix}"] == 1
    assert sum(server.requests.values()) == 3
    np.testing.assert_array_equal(read_everything(dataset)[0], np.concatenate(DOCUMENTS))
    read_everything(Dataset(url))  # from the cache
    assert all(server.requests[shard.file] == 1 for shard in dataset.manifest.shards)
    assert load_tokenizer(url).fingerprint == dataset.tokenizer.fingerprint
    assert dataset.path == url
    assert verify(url).total_tokens == 40_000


def test_in_memory():
    import fsspec

    files = fsspec.filesystem("memory")
    path = Path(os.environ["MEGALITE_CACHE"]) / "here"
    write(path, DOCUMENTS, batch_tokens=2000, shard_bytes=25_000, compression="zstd-shard")
    files.put(str(path), "/bucket/d", recursive=True)
    np.testing.assert_array_equal(read_everything(Dataset("memory://bucket/d"))[0], np.concatenate(DOCUMENTS))
    files.rm("/bucket/d/shard_00001.arrow.zst")
    with pytest.raises(
        DataError, match=r"cannot read memory://bucket/d/shard_00001\.arrow\.zst: FileNotFoundError"
    ):
        read_everything(Dataset("memory://bucket/d", cache=ShardCache(path / "other")))
    files.rm("/bucket", recursive=True)


@pytest.mark.parametrize("compression", [None, "zstd-shard"])
def test_a_network_that_fails_and_recovers(server, compression, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE_S", 0.4)
    url = served(server, compression=compression)
    suffix = ".arrow.zst" if compression == "zstd-shard" else ".arrow"
    server.faults = {
        "manifest.json": ["503", "cut"],
        f"shard_00000{suffix}": ["503", "503", "cut", "503", "cut"],
        f"shard_00001{suffix}": ["flip"],
        f"shard_00002{suffix}": ["silence"],
    }
    np.testing.assert_array_equal(read_everything(Dataset(url))[0], np.concatenate(DOCUMENTS))
    assert server.requests[f"shard_00000{suffix}"] == 6
    assert server.requests[f"shard_00001{suffix}"] == 2
    assert not any(server.faults.values())


def test_a_stream_that_breaks_again_and_again_but_goes_on(monkeypatch):
    """A failure after progress is the first again; what is to be passed over may come in small pieces."""
    monkeypatch.setattr(remote, "PAUSE_S", 0.0)
    content, opened = bytes(range(40)), []

    class Trickle(io.BytesIO):
        def read(self, size=-1):
            if not self.left:
                raise ConnectionResetError
            self.left -= 1
            return super().read(min(size, 5))

    def open_file(*_, **__):
        opened.append(Trickle(content))
        opened[-1].left = len(opened)  # one piece further than the last time
        return opened[-1]

    folder = remote.RemoteFolder("http://localhost/d")
    monkeypatch.setattr(folder, "_files", SimpleNamespace(open=open_file))
    assert folder.read("f", 100) == content
    assert len(opened) == 9
    assert folder._open("f", 13, 40).read(5) == content[13:18]


def test_a_network_that_stays_down(server):
    url = served(server)
    dataset = Dataset(url)
    server.faults["shard_00001.arrow"] = ["503"] * 99
    with pytest.raises(
        DataError, match=r"cannot read .*shard_00001\.arrow after 6 attempts: .*503.*; check the"
    ):
        dataset.block(7)
    server.faults.clear()
    assert dataset.block(7).tokens.size == 2000  # nothing remembers that it was down
    (server.root / "d" / "shard_00002.arrow").unlink()
    with pytest.raises(DataError, match=r"shard_00002\.arrow: FileNotFoundError"):
        dataset.block(12)
    with pytest.raises(DataError, match=r"nowhere/manifest\.json: FileNotFoundError"):
        Dataset(f"{server.url}/nowhere")
    server.faults["shard_00003.arrow"] = ["408", "429", "403", *["503"] * 99]
    with pytest.raises(DataError, match=r"shard_00003\.arrow: ClientResponseError: 403.* allow reading"):
        dataset.block(17)
    expected = {"shard_00001.arrow": 7, "shard_00002.arrow": 1, "shard_00003.arrow": 3}
    assert {name: server.requests[name] for name in expected} == expected
    server.server_close()


def test_a_server_that_speaks_nonsense_is_quoted_in_brief(server):
    """The client takes what follows a body longer than it says for the next answer, and quotes it all."""
    dataset = Dataset(served(server))
    server.faults["shard_00001.arrow"] = ["understated"] * 99
    with pytest.raises(DataError, match=r"cannot read .*shard_00001\.arrow after 6 attempts: ") as caught:
        dataset.block(7)
    assert len(str(caught.value)) < 600
    server.faults["shard_00001.arrow"] = ["understated"]
    assert dataset.block(7).tokens.size == 2000


def test_sources_of_a_mixture_share_a_small_cache(server, tmp_path):
    """What one has open does not keep the others from reading."""
    served(server)
    cache = ShardCache(tmp_path / "small", max_bytes=50_000)  # two shards
    datasets = [Dataset(f"{server.url}/d", cache=cache) for _ in range(3)]
    for block in (0, 5, 10, 15):
        for dataset in datasets:
            assert dataset.block(block).tokens.size == 2000


def test_damage_at_the_source_is_kept_to_its_block(server):
    url = served(server)
    path = server.root / "d" / "shard_00001.arrow"
    dataset = Dataset(url)
    offset, size = dataset.manifest.shards[1].batches[2, :2].tolist()
    data = bytearray(path.read_bytes())
    data[offset + size - 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptBlockError, match=rf"{url}/d?/?shard_00001\.arrow: record batch 2 is corrupt"):
        dataset.block(7)
    fetched = server.requests["shard_00001.arrow"]
    with pytest.raises(CorruptBlockError, match="record batch 2 is corrupt"):
        dataset.block(7)
    assert server.requests["shard_00001.arrow"] == fetched  # made anew once: it is not the cache's disk
    assert [dataset.block(n).tokens.size for n in (5, 6, 8, 9)] == [2000] * 4
    path.write_bytes(data + b"more")
    with pytest.raises(DataError, match="bytes, expected"):
        Dataset(url, cache=ShardCache(server.root / "other")).block(5)
    (server.root / "d" / "manifest.json").write_bytes(b"[" * (1 << 20))
    with pytest.raises(DataError, match="is not valid JSON"):
        Dataset(url)


def test_a_copy_that_changed_while_nobody_held_it_is_made_anew(server, monkeypatch):
    """Its blocks have been checked before, but were other bytes then."""
    monkeypatch.setattr("megalite.data.maps.OPEN_COPIES", 1)
    dataset = Dataset(served(server))
    tokens = dataset.block(7).tokens.copy()
    dataset.block(0)  # another shard: the copy is let go of
    (copy,) = Path(os.environ["MEGALITE_CACHE"]).glob("*-shard_00001.arrow")
    offset, size = dataset.manifest.shards[1].batches[2, :2].tolist()
    data = bytearray(copy.read_bytes())
    data[offset + size // 2] ^= 1
    copy.write_bytes(data)
    np.testing.assert_array_equal(dataset.block(7).tokens, tokens)
    assert server.requests["shard_00001.arrow"] == 2


def test_a_cache_smaller_than_the_dataset(server, tmp_path):
    cache = ShardCache(tmp_path / "small", max_bytes=50_000)  # two shards of four
    dataset = Dataset(served(server), cache=cache)
    stream = np.concatenate(DOCUMENTS)
    for block in np.random.default_rng(0).permutation(np.repeat(np.arange(dataset.num_blocks), 3)).tolist():
        tokens = dataset.block(block).tokens
        np.testing.assert_array_equal(tokens, stream[2000 * block : 2000 * (block + 1)])
        del tokens
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 50_000
    assert min(server.requests[f"shard_0000{n}.arrow"] for n in range(4)) > 1


def test_prefetch_fetches_in_the_background(server):
    dataset = Dataset(served(server))
    dataset.prefetch([6, 7, 16])
    deadline = time.monotonic() + 20
    while len(list(Path(os.environ["MEGALITE_CACHE"]).glob("*.arrow"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    server.faults = {
        f"shard_0000{n}.arrow": ["503"] * 99 for n in range(4)
    }  # so that only copies can be read
    for block in (5, 9, 15, 19):
        assert dataset.block(block).tokens.size == 2000
    dataset.prefetch([0])  # fails in the background, and says so to whoever reads
    with pytest.raises(DataError, match=r"shard_00000\.arrow after 6 attempts"):
        dataset.block(0)


def test_what_is_missing_is_named(monkeypatch):
    import sys

    with pytest.raises(DataError, match="nonsense://x: .*use http"):
        Dataset("nonsense://x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DataError, match=r"s3://bucket/d: .*pip install 'megalite\[remote\]'"):
        Dataset("s3://bucket/d")
