"""Writing: what is refused, what interruptions leave, that resumed or divided jobs make the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from megalite.data import manifest as manifest_module
from megalite.data import staging
from megalite.data.manifest import COMPRESSIONS, DOCUMENTS
from megalite.data.shards import Dataset
from megalite.data.tokenizer import ByteTokenizer
from megalite.data.writer import ShardWriter, join_datasets
from megalite.errors import DataError

from .datasets import WideTokenizer, random_documents, read_everything, verify, write

LENGTHS = [0, 5, 30, 0, 1, 90, 44, 3, 0, 60, 21, 88, 0, 70, 12, 0]


def content(folder: Path) -> dict[str, int]:
    """CRC of every file of a folder."""
    return {path.name: zlib.crc32(path.read_bytes()) for path in folder.iterdir()}


def feed(writer: ShardWriter, documents: list[np.ndarray], stop: int | None = None) -> None:
    for n, document in enumerate(documents[:stop]):
        writer.write(f"doc{n}", "test", document)


def empty_or_random() -> list[np.ndarray]:
    return [random_documents([n], seed=n)[0] if n else np.empty(0, dtype=np.int64) for n in LENGTHS]


def test_a_record_batch_holds_so_many_documents_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr("megalite.data.writer.BATCH_DOCUMENTS", 4)
    dataset = write(tmp_path / "d", random_documents([1] * 9))
    assert dataset.manifest.shards[0].batches[:, DOCUMENTS].tolist() == [4, 4, 1]


def test_what_is_refused(tmp_path):
    with ShardWriter(tmp_path / "d", ByteTokenizer()) as writer:
        with pytest.raises(DataError, match=r"document 'x': token 257 at 1 is not in \[0, 257\)"):
            writer.write("x", "s", np.array([1, 257]))
        with pytest.raises(DataError, match="token -1 at 0"):
            writer.write("x", "s", np.array([-1, 5]))
        with pytest.raises(DataError, match="document 'x': tokens are float64"):
            writer.write("x", "s", np.array([1.0]))
        with pytest.raises(DataError, match=r"document 'x': tokens are int64 \[1, 1\]"):
            writer.write("x", "s", np.array([[1]]))
        with pytest.raises(DataError, match="2147483647"):
            writer.write("x", "s", np.broadcast_to(np.uint16(1), 2**31))
        with pytest.raises(DataError, match="4096"):
            writer.write("i" * 5000, "s", np.array([1]))
        with pytest.raises(DataError, match="open the writer with has_loss_mask=True"):
            writer.write("x", "s", np.array([1, 2]), [(0, 1)])
        writer.write("ok", "s", np.array([1, 256]))
    with pytest.raises(DataError, match="already there"), ShardWriter(tmp_path / "d", ByteTokenizer()):
        pass
    assert Dataset(tmp_path / "d").num_documents == 1
    with pytest.raises(DataError, match="nothing was written"), ShardWriter(tmp_path / "e", ByteTokenizer()):
        pass
    with pytest.raises(DataError, match="compression='gzip'"):
        ShardWriter(tmp_path / "f", ByteTokenizer(), compression="gzip")
    assert sorted(os.listdir(tmp_path)) == ["d"]


@pytest.mark.parametrize(
    "spans", [[(1, 1)], [(2, 1)], [(-1, 2)], [(0, 6)], [(2, 4), (3, 5)], [1, 2], [(0.0, 1.0)]]
)
def test_loss_spans_that_are_refused(tmp_path, spans):
    with (
        pytest.raises(DataError, match="document 'x'.*loss_spans"),
        ShardWriter(tmp_path / "d", ByteTokenizer(), has_loss_mask=True) as writer,
    ):
        writer.write("x", "s", np.arange(5), spans)


def test_loss_spans(tmp_path):
    with ShardWriter(tmp_path / "d", ByteTokenizer(), has_loss_mask=True) as writer:
        writer.write("a", "s", np.arange(5), [(1, 2), (2, 4)])
        writer.write("none", "s", np.arange(3), [])
        writer.write("all", "s", np.arange(2))
    expected = [[0, 1, 1, 1, 0], [0, 0, 0], [1, 1]]
    documents = list(verify(tmp_path / "d").documents())
    assert [d.loss_mask.astype(int).tolist() for d in documents] == expected
    assert Dataset(tmp_path / "d").read(3, 9).loss_mask.astype(int).tolist() == [1, 0, 0, 0, 0, 1]


def test_empty_documents_are_left_out_and_counted(tmp_path):
    dataset = write(tmp_path / "d", empty_or_random(), batch_tokens=50)
    assert dataset.manifest.empty_documents == LENGTHS.count(0)
    assert dataset.num_documents == len(LENGTHS) - LENGTHS.count(0)
    assert [len(d.tokens) for d in dataset.documents()] == [n for n in LENGTHS if n]


def test_a_document_may_exceed_a_batch(tmp_path):
    dataset = write(tmp_path / "d", random_documents([3, 5000, 3]), batch_tokens=100)
    assert dataset.manifest.shards[0].batches[:, manifest_module.TOKENS].tolist() == [3, 5000, 3]


@pytest.mark.parametrize("resume", [False, True])
def test_an_exception_leaves_nothing_or_what_is_finished(tmp_path, resume):
    options = {"batch_tokens": 50, "shard_bytes": 600, "resume": resume}
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "d", ByteTokenizer(), **options) as writer:
        feed(writer, random_documents([40] * 20))
        raise RuntimeError
    assert os.listdir(tmp_path) == (["d.tmp"] if resume else [])
    with ShardWriter(tmp_path / "d", ByteTokenizer(), **options) as writer:
        assert (0 < writer.finished_documents < 20) is resume
        feed(writer, random_documents([40] * 20))
    assert os.listdir(tmp_path) == ["d"]
    assert verify(tmp_path / "d").num_documents == 20


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megalite.data.shard_file.ShardFile._append", full)
    with (
        pytest.raises(DataError, match="No space left on device; check space"),
        ShardWriter(tmp_path / "d", ByteTokenizer()) as writer,
    ):
        writer.write("a", "s", np.array([1, 256]))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("resume", [False, True])
def test_leftovers_of_a_killed_writer_are_cleared_but_nothing_else(tmp_path, resume):
    (tmp_path / "d.tmp").mkdir()
    (tmp_path / "d.tmp" / "shard_00000.arrow").write_bytes(b"half")
    write(tmp_path / "d", random_documents([4]), resume=resume)
    (tmp_path / "e.tmp").mkdir()
    (tmp_path / "e.tmp" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"thesis\.txt is in the way"):
        write(tmp_path / "e", random_documents([4]), resume=resume)
    assert (tmp_path / "e.tmp" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_resumed_anywhere_the_bytes_are_the_same(tmp_path, compression):
    documents = empty_or_random()
    options = {"batch_tokens": 50, "shard_bytes": 900, "compression": compression}
    write(tmp_path / "whole", documents, **options)
    expected = content(tmp_path / "whole")
    assert len(expected) > 4
    for stop in range(0, len(documents) + 1, 3):
        with (
            pytest.raises(InterruptedError),
            ShardWriter(tmp_path / f"d{stop}", ByteTokenizer(), resume=True, **options) as writer,
        ):
            feed(writer, documents, stop)
            raise InterruptedError
        with ShardWriter(tmp_path / f"d{stop}", ByteTokenizer(), resume=True, **options) as writer:
            finished = writer.finished_documents
            assert finished <= stop
            for n, document in enumerate(documents):  # half of them without their tokens
                if n < finished and n % 2:
                    writer.skip(f"doc{n}", "test")
                else:
                    writer.write(f"doc{n}", "test", document)
        assert content(tmp_path / f"d{stop}") == expected
    assert finished > 8


WRITE_SLOWLY = """
import sys, numpy as np
from tests.data.datasets import random_documents
from megalite.data.tokenizer import ByteTokenizer
from megalite.data.writer import ShardWriter
with ShardWriter(sys.argv[1], ByteTokenizer(), resume=True, batch_tokens=200, shard_bytes=2000) as writer:
    print("finished", writer.finished_documents, flush=True)
    for n, document in enumerate(random_documents([50] * 400)):
        writer.write(f"doc{n}", "test", document)
"""


@pytest.mark.slow
def test_a_writer_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    write(tmp_path / "whole", random_documents([50] * 400), batch_tokens=200, shard_bytes=2000)
    finished = [0]
    for _ in range(40):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE_SLOWLY, str(tmp_path / "d")], stdout=subprocess.PIPE, text=True
        )
        finished.append(int(writer.stdout.readline().split()[1]))
        shards = count_shards(tmp_path / "d.tmp")
        while writer.poll() is None and count_shards(tmp_path / "d.tmp") < shards + 12:
            time.sleep(0.001)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        if (tmp_path / "d").exists():
            break
    assert sum(a < b for a, b in zip(finished, finished[1:], strict=False)) >= 3
    assert content(tmp_path / "d") == content(tmp_path / "whole")
    assert not (tmp_path / "d.tmp").exists()


def count_shards(folder: Path) -> int:
    """Shards in a folder that may vanish."""
    try:
        return sum(name.startswith("shard") for name in os.listdir(folder))
    except FileNotFoundError:
        return 0


def interrupted(folder: Path, **options: object) -> None:
    with (
        pytest.raises(InterruptedError),
        ShardWriter(folder, ByteTokenizer(), resume=True, **options) as writer,
    ):
        feed(writer, random_documents([40] * 20))
        raise InterruptedError


def test_a_damaged_shard_is_written_again(tmp_path):
    options = {"batch_tokens": 50, "shard_bytes": 600}
    write(tmp_path / "whole", random_documents([40] * 20), **options)
    interrupted(tmp_path / "d", **options)
    file = tmp_path / "d.tmp" / "shard_00002.arrow"
    data = bytearray(file.read_bytes())
    data[300] ^= 1
    file.write_bytes(data)
    with (tmp_path / "d.tmp" / "journal.jsonl").open("a") as journal:
        journal.write('{"shard": ')  # a line cut short
    with ShardWriter(tmp_path / "d", ByteTokenizer(), resume=True, **options) as writer:
        assert writer.finished_documents == 2  # a shard holds one document
        feed(writer, random_documents([40] * 20))
    assert content(tmp_path / "d") == content(tmp_path / "whole")


def test_resuming_with_something_else_is_refused(tmp_path):
    options = {"batch_tokens": 50, "shard_bytes": 600}
    interrupted(tmp_path / "d", **options)
    with (
        pytest.raises(DataError, match="was begun with .*'compression': None.*remove it to begin anew"),
        ShardWriter(tmp_path / "d", ByteTokenizer(), resume=True, compression="zstd", **options),
    ):
        pass
    for other in ({"batch_tokens": 51}, {"shard_bytes": 601}, {"has_loss_mask": True}):
        with (
            pytest.raises(DataError, match="was begun with"),
            ShardWriter(tmp_path / "d", ByteTokenizer(), resume=True, **{**options, **other}),
        ):
            pass
    with (
        pytest.raises(DataError, match="documents are not those .* was made from"),
        ShardWriter(tmp_path / "d", ByteTokenizer(), resume=True, **options) as writer,
    ):
        for n in range(20):
            writer.write(f"other{n}", "test", np.arange(40))
    for n, (doc_id, source) in enumerate([("a b", "c"), ("a", "b c")]):  # the same letters in a row
        with (
            pytest.raises((InterruptedError, DataError)) as caught,
            ShardWriter(tmp_path / "e", ByteTokenizer(), resume=True, **options) as writer,
        ):
            assert bool(writer.finished_documents) == bool(n)
            for document in random_documents([40] * 4):
                writer.write(doc_id, source, document)
            raise InterruptedError
    assert "documents are not those" in str(caught.value)
    with (
        pytest.raises(DataError, match=r"1 documents were given, but .* was made from"),
        ShardWriter(tmp_path / "d", ByteTokenizer(), resume=True, **options) as writer,
    ):
        feed(writer, random_documents([40] * 20), 1)
    with (
        pytest.raises(DataError, match="write it instead of skipping it"),
        ShardWriter(tmp_path / "d", ByteTokenizer(), resume=True, **options) as writer,
    ):
        for n in range(20):
            writer.skip(f"doc{n}", "test")


WRITE_PART = """
import sys
from tests.data.test_writer import write_part
write_part(sys.argv[1], int(sys.argv[2]))
"""


def write_part(folder: str, part: int) -> None:
    """A third of 60 documents."""
    with ShardWriter(
        folder, ByteTokenizer(), batch_tokens=100, shard_bytes=1500, compression="zstd"
    ) as writer:
        for n, document in enumerate(random_documents([30] * 60)):
            if n // 20 == part:
                writer.write(f"doc{n}", "test", document)


@pytest.mark.slow
def test_parts_written_by_several_processes_are_joined(tmp_path):
    parts = [tmp_path / f"part{n}" for n in range(3)]
    running = [
        subprocess.Popen([sys.executable, "-c", WRITE_PART, str(part), str(n)])
        for n, part in enumerate(parts)
    ]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    join_datasets(parts, tmp_path / "d")
    for n, part in enumerate(parts):
        write_part(str(part), n)
    join_datasets(parts, tmp_path / "again")
    assert content(tmp_path / "d") == content(tmp_path / "again")
    assert sorted(os.listdir(tmp_path)) == ["again", "d"]
    dataset = verify(tmp_path / "d")
    np.testing.assert_array_equal(read_everything(dataset)[0], np.concatenate(random_documents([30] * 60)))
    assert [d.doc_id for d in dataset.documents()] == [f"doc{n}" for n in range(60)]


def test_a_manifest_too_large_to_be_read_is_not_written(tmp_path, monkeypatch):
    parts = [tmp_path / f"part{n}" for n in range(2)]
    for part in parts:
        write(part, random_documents([10]))
    largest = max((part / "manifest.json").stat().st_size for part in parts)
    monkeypatch.setattr(staging, "MAX_MANIFEST_BYTES", largest)
    with pytest.raises(DataError, match=f"2 record batches and a .* at most {largest:,} are"):
        join_datasets(parts, tmp_path / "d")
    assert all(verify(part).num_documents == 1 for part in parts)
    assert not (tmp_path / "d").exists()


def test_joined_parts_count_their_empty_documents(tmp_path):
    for name in "ab":
        write(tmp_path / name, [*random_documents([3, 5]), np.zeros(0, np.int64)])
    join_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "d")
    manifest = Dataset(tmp_path / "d").manifest
    assert (manifest.documents, manifest.empty_documents) == (4, 2)


def test_parts_that_cannot_be_joined(tmp_path):
    write(tmp_path / "a", random_documents([10]))
    write(tmp_path / "b", random_documents([10]), compression="zstd")
    write(tmp_path / "c", random_documents([10]), tokenizer=WideTokenizer())
    write(tmp_path / "m", random_documents([10]), spans=[[(0, 5)]])
    for other, key in (("b", "compression"), ("c", "tokenizer"), ("m", "has_loss_mask")):
        with pytest.raises(DataError, match=f"{other} has {key} .*, but .*a has .*; write all parts"):
            join_datasets([tmp_path / "a", tmp_path / other], tmp_path / "d")
    with pytest.raises(DataError, match="no parts to join"):
        join_datasets([], tmp_path / "d")
    with pytest.raises(DataError, match="already there"):
        join_datasets([tmp_path / "a"], tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c", "m"]
