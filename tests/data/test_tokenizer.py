"""Tokenizers: round trips, fingerprints, streams that never break a character."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.shards import Dataset
from megalite.data.tokenizer import ByteTokenizer, DecodeStream, JsonTokenizer, load_tokenizer, train_bpe
from megalite.data.writer import ShardWriter
from megalite.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SAMPLE = [
    "def read(self, size):\n    return self.buffer[:size]\n",
    "naïve café — 你好 🙂\n",
    "the the the then",
] * 20


@pytest.fixture(scope="module")
def bpe() -> JsonTokenizer:
    pytest.importorskip("tokenizers")
    return train_bpe(SAMPLE, 400)


@settings(deadline=None)
@given(TEXT)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=200)
@given(TEXT)
def test_bpe_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert ids.dtype == np.int64
    assert bpe.decode(ids) == text
    assert bpe.encode_batch([text, "x"])[0].tolist() == ids.tolist()


@settings(deadline=None, max_examples=200)
@given(TEXT)
def test_streamed_text_is_the_text(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        stream = DecodeStream(tokenizer)
        parts = [stream.feed(int(i)) for i in tokenizer.encode(text)]
        assert "".join(parts) + stream.flush() == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in part for part in parts)


def test_a_stream_begins_only_once():
    package = pytest.importorskip("tokenizers")
    inner = package.Tokenizer(package.models.WordLevel({"▁a": 0, "▁b": 1, "</s>": 2}, unk_token="</s>"))
    inner.decoder = package.decoders.Metaspace()  # it drops the space of a text's first token
    tokenizer = JsonTokenizer(inner.to_str())
    stream = DecodeStream(tokenizer)
    assert [stream.feed(token) for token in (0, 1, 0)] == ["a", " b", " a"]
    assert tokenizer.decode([0, 1, 0]) == "a b a"


@settings(deadline=None)
@given(st.lists(st.integers(0, 256), max_size=40))
def test_stream_of_garbage_keeps_up(ids):
    stream = DecodeStream(ByteTokenizer())
    for i in ids:
        stream.feed(i)
        assert len(stream._held) < 4
    stream.flush()
    assert stream.flush() == ""


def test_special_names_in_text_are_only_text(bpe):
    text = "end <|endoftext|> of"
    assert bpe.eos_id not in bpe.encode(text)
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode([bpe.eos_id]) == "<|endoftext|>"
    assert ByteTokenizer().decode([65, 256, 300]) == "A<|endoftext|>"


def test_save_and_load(tmp_path, bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        folder = tmp_path / tokenizer.kind
        folder.mkdir()
        tokenizer.save(folder)
        for path in (folder, folder / "tokenizer.json"):
            loaded = load_tokenizer(path)
            for name in ("kind", "vocab_size", "eos_id", "fingerprint"):
                assert getattr(loaded, name) == getattr(tokenizer, name)
            assert loaded.encode("naïve def").tolist() == tokenizer.encode("naïve def").tolist()


def test_fingerprint_ignores_layout_but_not_content(bpe):
    content = json.loads(bpe.content)
    assert JsonTokenizer(json.dumps(content, indent=3)).fingerprint == bpe.fingerprint
    assert JsonTokenizer(bpe.content, eos_token="the").fingerprint != bpe.fingerprint
    content["model"]["merges"].pop()
    assert JsonTokenizer(json.dumps(content)).fingerprint != bpe.fingerprint
    assert train_bpe(SAMPLE, 400).fingerprint == bpe.fingerprint


def test_truncation_and_padding_in_the_file_are_not_obeyed(bpe):
    content = json.loads(bpe.content)
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    text = "def read(self, size): return"
    assert JsonTokenizer(json.dumps(content)).encode(text).tolist() == bpe.encode(text).tolist()


def test_eos_is_found_or_named(tmp_path, bpe):
    def renamed(name: str) -> str:
        return bpe.content.replace("<|endoftext|>", name)

    for name in ("</s>", "<|end_of_text|>", "<eos>"):
        assert JsonTokenizer(renamed(name)).eos_id == 0
    with pytest.raises(DataError, match="no end-of-document token"):
        JsonTokenizer(renamed("<stop>"))
    (tmp_path / "tokenizer.json").write_text(renamed("<stop>"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert load_tokenizer(tmp_path).eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="not a tokenizer configuration"):
        load_tokenizer(tmp_path)


def test_bad_files(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="no tokenizer"):
        load_tokenizer(path)
    for text, message in (
        ("{", "not valid JSON"),
        ("{}", "is not a tokenizer"),
        ("[" * 99_999, "not valid JSON"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            load_tokenizer(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot read"):
        load_tokenizer(path)
    with pytest.raises(DataError, match="vocab_size=256"):
        train_bpe(["x"], 256)
    with pytest.raises(DataError, match="no text"):
        train_bpe([], 300)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'megalite\[tokenizers\]'"):
        train_bpe(["x"], 300)


def test_a_dataset_carries_its_tokenizer(tmp_path, bpe):
    with ShardWriter(tmp_path / "d", bpe) as writer:
        writer.write("a", "s", np.append(bpe.encode("naïve"), bpe.eos_id))
    dataset = Dataset(tmp_path / "d")
    loaded = load_tokenizer(tmp_path / "d")
    assert loaded.fingerprint == dataset.tokenizer.fingerprint
    assert loaded.decode(next(iter(dataset.documents())).tokens[:-1]) == "naïve"
    ByteTokenizer().save(tmp_path / "d")
    with pytest.raises(DataError, match="not the tokenizer of this dataset"):
        Dataset(tmp_path / "d")
