"""`megalite data verify`, `show` and `stats`: every fault named, boundaries visible, counts right."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_tools import verify as verify_module
from data_tools.show import BOUNDARY, coloured, printable
from data_tools.verify import find_faults
from megalite.data.shards import CorruptBlockError, Dataset
from megalite.data.tokenizer import ByteTokenizer
from megalite.data.writer import ShardWriter
from megalite.errors import DataError

from .datasets import megalite, random_documents, write

TEXTS = {"wiki": ["first", "the second one", "é"], "code": ["x = 1\n" * 40, "\x1b[31mred\x07"]}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five small documents of two sources, with a loss mask on one of them."""
    with ShardWriter(tmp_path / "d", ByteTokenizer(), batch_tokens=100, has_loss_mask=True) as writer:
        for source, texts in TEXTS.items():
            for n, text in enumerate(texts):
                tokens = np.append(ByteTokenizer().encode(text), 256)
                writer.write(f"{source}{n}", source, tokens, [(4, 10)] if text == "the second one" else None)
        writer.write("nothing", "wiki", np.empty(0, dtype=np.int64))
    return tmp_path / "d"


def flip(path: Path, *places: int) -> None:
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("command", ["tokenize", "verify", "show", "stats"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit):
        megalite("data", command, "--help")
    assert f"megalite data {command} " in capsys.readouterr().out.partition("example:")[2]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("compression", [None, "zstd", "zstd-shard"])
def test_every_fault_is_named_once(tmp_path, compression, threads, monkeypatch):
    monkeypatch.setattr(verify_module, "TASK_BYTES", 1000)
    folder = tmp_path / "d"
    options = {"batch_tokens": 200, "shard_bytes": 3000, "compression": compression}
    dataset = write(folder, random_documents([100] * 60), **options)
    files = [folder / shard.file for shard in dataset.manifest.shards]
    assert len(files) >= 4
    seen: list[tuple[int, int]] = []
    assert find_faults(Dataset(folder), lambda *done: seen.append(done), threads) == []
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > sum(path.stat().st_size for path in files)
    if compression == "zstd-shard":
        flip(files[0], 0)
    else:
        rows = dataset.manifest.shards[0].batches[[0, 2]]
        flip(files[0], *(rows[:, 0] + rows[:, 1] - 30).tolist())
    flip(files[1], -2)  # in the footer, or the end of the stream
    files[2].unlink()
    monkeypatch.setenv("MEGALITE_CACHE", str(tmp_path / "empty"))
    faults = find_faults(Dataset(folder), None, threads)
    bad = [(fault.file, fault.batch) for fault in faults if isinstance(fault, CorruptBlockError)]
    per_shard = len(dataset.manifest.shards[0].batches)
    if compression == "zstd-shard":
        assert bad[:per_shard] == [(str(files[0]), n) for n in range(per_shard)]
    else:
        assert bad == [(str(files[0]), 0), (str(files[0]), 2)]
    messages = [str(fault) for fault in faults]
    for path in files[:2]:
        assert sum(m.startswith(f"{path}: the file has CRC") for m in messages) == 1
    assert sum("is missing" in m for m in messages) == 1
    assert len(set(messages)) == len(messages)


def test_verify_prints_faults_and_exits_with_2(tmp_path):
    for part in ("train", "valid"):
        write(tmp_path / part, random_documents([100] * 20), batch_tokens=200)
    flip(tmp_path / "train" / "shard_00000.arrow", 2000, 4000)
    command = [sys.executable, "-m", "megalite", "data", "verify", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.count(": record batch ") == 2
    assert f"{tmp_path / 'valid'}: sound; 1 shards, 20 documents, 2,000 tokens" in done.stdout
    assert done.stderr.count("\n") == 1
    assert "train has 3 faults, named above" in done.stderr


def test_verify_one_dataset_or_a_folder_of_them(tmp_path, capsys):
    write(tmp_path / "all" / "valid", random_documents([10]))
    assert megalite("data", "verify", tmp_path / "all") == 0
    assert megalite("data", "verify", tmp_path / "all" / "valid") == 0
    assert capsys.readouterr().out.count("valid: sound; 1 shards, 1 documents, 10 tokens") == 2
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        megalite("data", "verify", tmp_path)


def test_show_documents(folder, capsys):
    assert megalite("data", "show", folder, "--documents", 5, "--tokens", 100) == 0
    out = capsys.readouterr().out
    assert "── wiki wiki0 · tokens [0, 6)\nfirst<|endoftext|>\n" in out
    assert "── wiki wiki2 · tokens [21, 24)\né<|endoftext|>" in out
    assert "… 141 more tokens" in out
    assert "␛[31mred␇" in out
    assert out.endswith(f"5 documents, {Dataset(folder).total_tokens} tokens\n")
    assert not {"\x1b", "\x07"} & set(out)


def test_show_packed_rows(folder, capsys):
    assert megalite("data", "show", folder, "--seq-len", 10, "--rows", 2) == 0
    out = capsys.readouterr().out
    assert "── row 0 · tokens [0, 10) · 2 documents, begins with one\nfirst<|endoftext|>┃the \n" in out
    assert "── row 1 · tokens [10, 20) · 1 document, begins inside one\nsecond one\n" in out
    last = -(-Dataset(folder).total_tokens // 10) - 1
    assert megalite("data", "show", folder, "--seq-len", 10, "--start", last) == 0
    assert f"── row {last} · tokens [{last * 10}, {Dataset(folder).total_tokens})" in capsys.readouterr().out
    with pytest.raises(DataError, match=rf"has {last + 1} rows of 10 tokens; there is no row {last + 1}"):
        megalite("data", "show", folder, "--seq-len", 10, "--start", last + 1)


def test_boundaries_are_coloured(folder):
    text = coloured(Dataset(folder).read(0, 24), ByteTokenizer(), 0)
    parts = [(text.plain[s.start : s.end], str(s.style)) for s in text.spans]
    assert parts == [
        ("first<|endoftext|>", "cyan"),
        (BOUNDARY, "bold red"),
        ("the ", "green dim strike"),
        ("second", "green"),
        (" one<|endoftext|>", "green dim strike"),
        (BOUNDARY, "bold red"),
        ("é<|endoftext|>", "yellow"),
    ]
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="standard").print(text)
    assert "\x1b[36mfirst" in out.getvalue()


def test_nothing_printed_moves_the_cursor():
    assert printable("a\tb\nc\rd\x9b\x7f\0") == "a\tb\nc␍d\ufffd\ufffd␀"


def test_stats(folder, capsys, tmp_path):
    svg = tmp_path / "lengths.svg"
    assert megalite("data", "stats", folder, "--svg", svg) == 0
    out = capsys.readouterr().out
    assert ["code", "2", "251", "91.3%", "10", "126", "241", "100.0%"] in map(str.split, out.splitlines())
    assert "1 empty documents were left out" in out
    rows = [line.split() for line in out.splitlines() if "…" in line and "█" in line]
    assert [(row[0], row[-2]) for row in rows if row[-2] != "0"] == [
        ("2", "1"),
        ("4", "1"),
        ("8", "2"),
        ("128", "1"),
    ]
    texts = [node.text for node in ET.parse(svg).getroot() if node.tag.endswith("text")]
    assert texts[0] == f"{folder}: documents by length in tokens"
    assert texts[1:3] == ["2 … 3", "1"]


def test_a_picture_of_a_folder_whose_name_is_not_utf8(folder, tmp_path):
    named = shutil.copytree(folder, os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    assert megalite("data", "stats", named, "--svg", tmp_path / "lengths.svg") == 0
    assert "\\udcff: documents by length" in (tmp_path / "lengths.svg").read_text()


def test_stats_as_json(folder, capsys):
    assert megalite("data", "stats", folder, "--json") == 0
    stats = json.loads(capsys.readouterr().out)
    assert (stats["documents"], stats["tokens"], stats["empty_documents"]) == (5, 275, 1)
    assert list(stats["sources"]) == ["code", "wiki"]
    wiki = stats["sources"]["wiki"]
    assert wiki == {
        "documents": 3,
        "tokens": 24,
        "loss_tokens": 6 + 6 + 3,
        "shortest": 3,
        "mean": 8.0,
        "longest": 15,
        "histogram": {"2": 1, "4": 1, "8": 1},
    }


def test_stats_count_what_reading_finds(tmp_path, capsys):
    lengths = np.random.default_rng(0).geometric(0.01, 300).tolist()
    write(tmp_path / "d", random_documents(lengths), batch_tokens=3000)
    megalite("data", "stats", tmp_path / "d", "--json")
    source = json.loads(capsys.readouterr().out)["sources"]["test"]
    assert source["histogram"] == {
        str(1 << b): n for b, n in enumerate(np.bincount([n.bit_length() - 1 for n in lengths]).tolist()) if n
    }
    assert (source["tokens"], source["longest"]) == (sum(lengths), max(lengths))
    assert source["loss_tokens"] == source["tokens"]


def test_text_becomes_shards_without_any_extra_but_tokenizers(tmp_path: Path) -> None:
    # What launch/quickstart installs. A module that is None in sys.modules cannot be imported.
    program = f"""
import sys
sys.modules.update(dict.fromkeys(["numba", "ftfy", "py3langid", "resiliparse", "tiktoken", "datasets"]))
from megalite.cli import main
sys.exit(main(["data", "tokenize", "--text", {str(tmp_path / "text")!r}, "--to", {str(tmp_path / "data")!r}]))
"""
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / f"text/{number}.md").write_text(f"Some words, {number} of them, and more of these. " * 20)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/train/manifest.json").exists()
