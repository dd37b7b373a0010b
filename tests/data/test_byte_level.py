"""tiktoken's rank files become a `tokenizer.json` that gives the same ids."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megalite.data.byte_level import CL100K, ENCODINGS, GPT2, O200K, Encoding, byte_letters, from_ranks
from megalite.data.tokenizer import JsonTokenizer, load_tokenizer, train_bpe
from megalite.errors import DataError

tiktoken = pytest.importorskip("tiktoken")
pytest.importorskip("tokenizers")

# The expressions in the words of the tiktoken package, which uses another engine.
THEIRS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k_base": O200K,
}
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text(" \n\raAbB1é漢'sſ/.", max_size=60)


def lines(ranks: dict[bytes, int]) -> list[bytes]:
    return [base64.b64encode(token) + f" {rank}".encode() for token, rank in ranks.items()]


def bytes_and(*tokens: bytes) -> dict[bytes, int]:
    return {token: rank for rank, token in enumerate([*(bytes((byte,)) for byte in range(256)), *tokens])}


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    text = (
        "The cat's tail isn't here: 1234 times.\n\n    def f(x): 'S naïve 你好世界 Привет aaaaaaaa WE'LL\r\n"
        * 20
    )
    table = json.loads(train_bpe([text], 400).content)
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    merged = [bytes(byte_of[letter] for letter in "".join(pair)) for pair in table["model"]["merges"]]
    return bytes_and(*dict.fromkeys(merged))


@pytest.mark.parametrize("pattern", THEIRS)
def test_ids_are_those_of_tiktoken(tmp_path, ranks, pattern):
    (tmp_path / "own.tiktoken").write_bytes(b"\n".join(lines(ranks)) + b"\n")
    ours = load_tokenizer(tmp_path / "own.tiktoken", pattern=pattern)
    theirs = tiktoken.Encoding("own", pat_str=THEIRS[pattern], mergeable_ranks=ranks, special_tokens={})
    assert (ours.eos_id, ours.vocab_size) == (len(ranks), len(ranks) + 1)
    ours.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == ours.fingerprint

    @settings(deadline=None, max_examples=80)
    @given(TEXT)
    def same(text: str) -> None:
        ids = ours.encode(text)
        assert ids.tolist() == theirs.encode_ordinary(text)
        assert ours.decode(ids) == text

    same()
    assert ours.encode("a <|endoftext|>").max() < len(ranks)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.text("ab", min_size=2, max_size=6), max_size=12, unique=True),
    st.lists(st.text("abc ", max_size=30), max_size=6),
)
@example(["aa", "aaa"], ["aaac"])  # of equal pairs the first is merged
def test_ranks_in_any_order_even_those_no_training_gives(tokens, texts):
    ranks = bytes_and(*(token.encode() for token in tokens))
    ours = JsonTokenizer(from_ranks(lines(ranks), "gpt2", "ranks"))
    theirs = tiktoken.Encoding("own", pat_str=THEIRS["gpt2"], mergeable_ranks=ranks, special_tokens={})
    for text in texts:
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text)


def test_a_published_encoding_is_known_by_its_ranks_and_keeps_its_special_tokens(monkeypatch):
    assert {encoding.expression for encoding in ENCODINGS.values()} == {GPT2, CL100K, O200K}
    special = {"<|endoftext|>": 258, "<|endofprompt|>": 300}
    monkeypatch.setitem(ENCODINGS, "tiny", Encoding(CL100K, 257, special))
    ranks = lines(bytes_and(b"ab"))
    table = json.loads(from_ranks(ranks, None, "ranks"))
    assert table["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": CL100K}
    assert {token["content"]: token["id"] for token in table["added_tokens"]} == special
    made = JsonTokenizer(json.dumps(table))
    assert (made.vocab_size, made.eos_id, made.encode("ab").tolist()) == (301, 258, [256])
    behind = JsonTokenizer(from_ranks([*ranks[:-1], b"YWI= 300"], "gpt2", "ranks"))
    assert (behind.vocab_size, behind.eos_id) == (302, 301)  # own ranks may have gaps
    with pytest.raises(DataError, match="rank 258 belongs to a special token of tiny"):
        from_ranks([*ranks[:-1], b"YWI= 258"], "tiny", "ranks")


def test_bad_files(tmp_path, ranks):
    good = lines(bytes_and(b"ab"))
    for bad, message in (
        ([b"!!! 3"], "ranks:1: b'!!! 3' is not a base64 token"),
        ([*good, b"YWI= x"], "ranks:258"),
        ([*good, b"YWI= 999"], "is empty, a repeat or wrong"),
        ([*good, b"YWJj 5"], "is empty, a repeat or wrong"),
        (good[1:], "no rank for the byte 0x00"),
    ):
        with pytest.raises(DataError, match=message):
            from_ranks(bad, "gpt2", "ranks")
    with pytest.raises(DataError, match="has 257 ranks, as no known encoding; name its pattern"):
        from_ranks(good, None, "ranks")
    with pytest.raises(DataError, match="pattern 'cl100k' is not known; did you mean 'cl100k_base'"):
        from_ranks(good, "cl100k", "ranks")
    train_bpe(["text"], 257).save(tmp_path)
    with pytest.raises(DataError, match=r"pattern='gpt2' is for \.tiktoken files"):
        load_tokenizer(tmp_path, pattern="gpt2")
    with pytest.raises(DataError, match="fetch it first"):
        load_tokenizer("https://example.org/x.tiktoken")
