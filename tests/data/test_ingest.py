"""From text to shards: what is read, what is left out and counted, what is held out."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data_tools.ingest import STDLIB, Corpus, TextDocument, corpus
from data_tools.ingest.stdlib import docstrings
from data_tools.tokenize import build_shards, finished_build, hold_out, sample_texts
from megalite.data.manifest import VERSION
from megalite.data.shards import Dataset
from megalite.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from megalite.errors import DataError

from .datasets import megalite


def documents(count: int, words: int = 40) -> list[TextDocument]:
    rng = np.random.default_rng(0)
    return [
        TextDocument(f"d{n}", "made", " ".join(f"word{w}" for w in rng.integers(0, 99, words)))
        for n in range(count)
    ]


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "text"
    (root / "sub").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "b.txt").write_text("second")
    (root / "a.md").write_bytes(b"\xef\xbb\xbffirst \xc3\xa9")
    (root / "sub" / "c.py").write_text("third")
    (root / "copy.txt").write_text("second")
    (root / "empty.txt").write_text(" \n")
    (root / "image.png").write_bytes(b"\x89PNG\0\0")
    (root / "latin.txt").write_bytes("é".encode("latin-1"))
    (root / ".git" / "hidden.txt").write_text("hidden")
    lines = [
        {"text": "from json", "id": "j1"},
        {"text": "unnamed"},
        {"no": 1},
        {"text": 5},
        {"text": "\ud800"},
    ]
    (root / "d.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\nnot json\n")
    return root


def test_a_folder(folder):
    corpus = Corpus([folder])
    found = {d.doc_id: d.text for d in corpus}
    assert found == {
        "a.md": "first é",
        "b.txt": "second",
        "d.jsonl:2": "unnamed",
        "j1": "from json",
        "sub/c.py": "third",
    }
    counts = corpus.counts
    assert (counts.documents, counts.duplicates, counts.empty) == (5, 1, 1)
    assert (counts.not_text, counts.malformed) == (2, 4)
    assert counts.text_bytes == sum(len(text.encode()) for text in found.values())
    assert [d.doc_id for d in corpus] == [d.doc_id for d in corpus]
    assert "1 duplicate, 1 empty, 2 not UTF-8 text, 4 malformed" in counts.summary()
    assert {d.source for d in corpus} == {"text"}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_compressed_or_not(tmp_path, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    halves = [
        "".join(json.dumps({"text": f"text {n}" * 50}) + "\n" for n in range(a, a + 100)) for a in (0, 100)
    ]
    path = tmp_path / f"x.jsonl{suffix}"
    data = b"".join(pack(half.encode()) for half in halves)  # two members, two frames
    path.write_bytes(data)
    assert [d.text for d in Corpus([path])] == [f"text {n}" * 50 for n in range(200)]
    if suffix:
        path.write_bytes(data[:-9])
        with pytest.raises(DataError, match=r"x\.jsonl.* to its end: .*; is it complete"):
            list(Corpus([path]))


def test_a_line_of_any_length_is_not_swallowed(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 1000)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"text": "a" * 10_000_000}).encode()))
    with pytest.raises(DataError, match=r"x\.jsonl\.gz:1 is longer than 1000 bytes"):
        list(Corpus([path]))


def test_one_large_file_is_cut_at_line_ends(tmp_path):
    path = tmp_path / "book.txt"
    text = "".join(f"line {n} of the book — é\n" for n in range(20_000))
    path.write_text(text)
    pieces = [d.text for d in Corpus([path])]
    assert "".join(pieces) == text
    assert len(pieces) > 50
    assert all(piece.endswith("\n") for piece in pieces)
    endless = "é".join(map(str, range(5_000)))  # no line end to cut at
    path.write_text(endless)
    assert "".join(d.text for d in Corpus([path])) == endless
    path.write_bytes(b"good\n" * 10_000 + b"\xff\xfe")
    with pytest.raises(DataError, match="stops being UTF-8 text"):
        list(Corpus([path]))


def test_no_text(tmp_path):
    with pytest.raises(DataError, match=r"no text at .*missing; give text files"):
        Corpus([tmp_path / "missing"])
    with pytest.raises(DataError, match="no text named"):
        Corpus([])
    with pytest.raises(DataError, match=r"no text found in .*; give text files"):
        list(Corpus([tmp_path]))
    (tmp_path / "x.bin").write_bytes(b"\0\1\2")
    with pytest.raises(DataError, match="1 not UTF-8 text"):
        list(Corpus([tmp_path]))


@pytest.mark.slow
def test_the_standard_library_is_enough_text():
    corpus = Corpus([STDLIB])
    assert corpus.estimate_bytes() > 8e6
    ids = [d.doc_id for d in corpus]
    assert corpus.counts.text_bytes > 10e6
    assert len(set(ids)) == len(ids)
    assert "json/decoder.py" in ids
    assert "json/decoder.py#docstrings" in ids
    assert any(i.startswith("topics/") for i in ids)
    assert not any("site-packages" in i or i.startswith("/") for i in ids)
    limited = Corpus([STDLIB], max_bytes=1_000_000)
    assert [d.doc_id for d in limited] == ids[: limited.counts.documents]
    assert 1_000_000 <= limited.counts.text_bytes < 1_400_000


def test_docstrings_are_named():
    source = '"""Top."""\nclass A:\n    """An A."""\n    def f(self):\n        """Do f."""\n'
    assert docstrings(source) == "Top.\n\nA\nAn A.\n\nA.f\nDo f."
    assert docstrings("def (") == ""


def test_held_out_documents(tmp_path):
    many = documents(3000)
    held = {d.doc_id for d, is_held_out in hold_out(many, 0.05) if is_held_out}
    assert 100 < len(held) < 200
    grown = {d.doc_id for d, is_held_out in hold_out(reversed(documents(4000)), 0.05) if is_held_out}
    assert held <= grown
    for count in (2, 3, 10):
        few = list(hold_out(documents(count), 1e-9))
        assert [d for d, _ in few] == documents(count)
        assert sum(is_held_out for _, is_held_out in few) == 1
    assert list(hold_out([], 0.5)) == []
    with pytest.raises(DataError, match="one document cannot be split"):
        list(hold_out(documents(1), 0.5))
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(DataError, match="between 0 and 1"):
            list(hold_out(documents(3), fraction))
    same = [TextDocument("x", "s", f"text {n}") for n in range(9)]  # ids that tell nothing apart
    assert [is_held_out for _, is_held_out in hold_out(same, 1e-9)] == [True] + 8 * [False]
    for fraction in (0.3, 1e-9):  # a module and its docstrings, on one side
        modules = [TextDocument(f"x{n // 2}{'#docstrings' * (n % 2)}", "s", "t") for n in range(200)]
        split = [is_held_out for _, is_held_out in hold_out(modules, fraction)]
        assert split[::2] == split[1::2]
        assert len(set(split)) == 2


def test_a_tokenizer_sees_no_held_out_text():
    many = documents(500)
    size = sum(len(d.text) for d in many)
    held = {d.text for d, is_held_out in hold_out(many, 0.2) if is_held_out}
    everything = sample_texts(many, 0.2, 10 * size)
    assert set(everything) == {d.text for d in many} - held
    part = sample_texts(many, 0.2, size // 10)
    assert size // 10 <= sum(map(len, part)) < size // 10 + 1000
    assert set(part) <= set(everything)
    assert part == sample_texts(many, 0.2, size // 10)


@pytest.mark.parametrize("compression", [None, "zstd-shard"])
def test_build(tmp_path, compression):
    many = documents(300)
    recipe = {"text": ["made"]}
    stats = build_shards(many, ByteTokenizer(), tmp_path / "out", compression=compression, recipe=recipe)
    train, valid = Dataset(tmp_path / "out" / "train"), Dataset(tmp_path / "out" / "valid")
    stored = {d.doc_id: d.tokens for part in (train, valid) for d in part.documents()}
    assert stored.keys() == {d.doc_id for d in many}
    for d in many:
        assert stored[d.doc_id].tolist() == [*d.text.encode(), 256]
    assert (stats.train.tokens, stats.valid.tokens) == (train.total_tokens, valid.total_tokens)
    assert stats.train.documents + stats.valid.documents == 300
    assert stats.bytes_per_token == pytest.approx(
        sum(len(d.text) for d in many) / (sum(map(len, stored.values())))
    )
    seen = np.bincount(train.read(0, train.total_tokens)[0], minlength=257) + 1
    tokens = valid.read(0, valid.total_tokens).tokens
    assert stats.unigram_entropy == pytest.approx(-np.log(seen / seen.sum())[tokens].mean())
    assert finished_build(tmp_path / "out", recipe) == stats
    assert sorted(os.listdir(tmp_path)) == ["out"]
    with pytest.raises(DataError, match="already there"):
        build_shards(many, ByteTokenizer(), tmp_path / "out")
    with pytest.raises(DataError, match=r"was built with text=\['made'\], not \['other'\]"):
        finished_build(tmp_path / "out", {"text": ["other"]})
    manifest = tmp_path / "out" / "valid" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"version": {VERSION}', '"version": 2'))
    with pytest.raises(DataError, match=r"valid.*version is 2; this megalite reads .* build it again"):
        finished_build(tmp_path / "out", recipe)
    shutil.rmtree(tmp_path / "out" / "train")
    with pytest.raises(DataError, match=r"train"):
        finished_build(tmp_path / "out", recipe)
    (tmp_path / "out" / "stats.json").write_text("[]")
    with pytest.raises(DataError, match="is damaged"):
        finished_build(tmp_path / "out", recipe)


def test_a_build_that_breaks_off_leaves_nothing_and_can_be_repeated(tmp_path):
    def breaks():
        yield from documents(50)
        raise DataError("the source broke")

    with pytest.raises(DataError, match="the source broke"):
        build_shards(breaks(), ByteTokenizer(), tmp_path / "out")
    assert os.listdir(tmp_path) == []
    killed = tmp_path / "out.tmp" / "train.tmp"
    killed.mkdir(parents=True)
    (killed / "shard_00000.arrow").write_bytes(b"half")
    assert finished_build(tmp_path / "out", {}) is None
    build_shards(documents(50), ByteTokenizer(), tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_nothing_to_build(tmp_path):
    with pytest.raises(DataError, match="no documents"):
        build_shards([], ByteTokenizer(), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="already there"):
        build_shards(documents(5), ByteTokenizer(), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_the_command_line(tmp_path, capsys):
    text = tmp_path / "book.txt"
    text.write_text("".join(f"A sentence about {n} things, and another.\n" for n in range(3000)))
    out = tmp_path / "out"
    options = ("data", "tokenize", "--text", text, "--to", out, "--tokenizer", "bpe", "--vocab-size", 300)
    assert megalite(*options) == 0
    assert "unigram entropy" in capsys.readouterr().out
    assert megalite(*options) == 0
    assert f"{out} is already built\n" in capsys.readouterr().out
    with text.open("a") as file:
        file.write("And one more.\n")
    assert megalite(*options) == 0
    assert f"already built, from other text than {text} holds now: remove it" in capsys.readouterr().out
    with pytest.raises(DataError, match="was built with tokenizer='bpe', not 'byte'"):
        megalite("data", "tokenize", "--text", text, "--to", out, "--tokenizer", "byte")
    assert megalite("data", "verify", out) == 0
    shown = capsys.readouterr().out
    assert shown.count("sound") == 2
    assert load_tokenizer(out / "train").vocab_size == 300
    assert megalite("data", "show", out / "train", "--documents", 1) == 0
    shown = capsys.readouterr().out
    assert "A sentence about" in shown
    assert "tokens [0, " in shown
    assert "documents not shown" in shown
    other = ("data", "tokenize", "--text", text, "--to", tmp_path / "two", "--max-mib", 0.05)
    with_file = (*other, "--tokenizer", tmp_path / "tokenizer.json", "--compression", "zstd")
    shutil.copy(out / "train" / "tokenizer.json", tmp_path)
    assert megalite(*with_file) == 0
    capsys.readouterr()
    two = Dataset(tmp_path / "two" / "train")
    assert two.tokenizer == Dataset(out / "train").tokenizer
    assert two.manifest.compression == "zstd"
    assert megalite(*with_file) == 0
    assert "two is already built\n" in capsys.readouterr().out
    train_bpe(["other words, other merges"] * 50, 280).save(tmp_path)
    assert megalite(*with_file) == 0
    assert "already built, with another tokenizer than" in capsys.readouterr().out
    text.unlink()
    assert megalite(*options) == 0  # whoever goes on with a run may have no text any more
    assert f"{out} is already built\n" in capsys.readouterr().out


def test_shards_are_not_written_among_the_text(tmp_path):
    """They would be text themselves the next time."""
    (tmp_path / "book.txt").write_text("Some words.\n")
    with pytest.raises(DataError, match="holds .*data, so that what is written would be read the next time"):
        megalite("data", "tokenize", "--text", tmp_path, "--to", tmp_path / "data", "--tokenizer", "byte")
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys, megalite.data.loader, data_tools.tokenize; assert 'torch' not in sys.modules; "
        "assert 'tokenizers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, data_tools.cli; assert not {'numpy', 'pyarrow', 'torch', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
