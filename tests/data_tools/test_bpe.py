"""The compiled byte-level BPE gives the ids of the `tokenizers` package, whatever the text."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools.bpe.encoder import BpeEncoder
from data_tools.bpe.model import Unknown, read_model
from data_tools.bpe.pretokens import PATTERNS
from data_tools.bpe.table import PADDING, empty_table, find, put
from data_tools.documents import Texts
from megalite.data.tokenizer import JsonTokenizer, train_bpe

SAMPLE = [
    "The cat's tail isn't where the dog'll look; they'd say WE'VE seen 1234567890 of.\n\n\n  def f(x):\n",
    "naïve café — 你好世界，こんにちは 🙂 Привет, мир! ÄÖÜ straße \u0301x\r\n\t\t//\n/ ...!!!   \n",
    "aaaaaaaa aaaa bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb HTTPServer getElementById ABCdef'LL 'ſ",
] * 20
FRAGMENTS = [
    *("'s", "'S", "'ſ", "'t", "'re", "'LL", "'Ve", "'d", "'x", "'", "''", " '"),
    *(" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n ", "\u00a0", "\u3000", "\u2028", "\u0085", "\u180e"),
    *("1", "12", "123", "1234", "٣", "½", "Ⅷ", "/", "//", "\n/", "!", "...", "_", "\0"),
    *(
        "a",
        "A",
        "aB",
        "Ab",
        "ABc",
        "ß",
        "ǅ",
        "ʰ",
        "漢字",
        "かな",
        "ไทย",
        "\u0301",
        "e\u0301",
        "A\u0301",
        "🙂",
        "ЖжЖ",
    ),
]
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=2)), max_size=40).map("".join),
).filter(lambda text: text.isprintable() or text.encode("utf-8", "ignore").decode() == text)


def tokenizer(pattern: int, **model: Any) -> JsonTokenizer:
    """A tiny BPE with an expression of PATTERNS."""
    table = json.loads(train_bpe(SAMPLE, 400).content)
    if pattern:
        cut = {"Regex": PATTERNS[pattern]}
        way = (
            {"behavior": "Isolated", "invert": False}
            if pattern == 1
            else {"behavior": "Removed", "invert": True}
        )
        split = {"type": "Split", "pattern": cut, **way}
        steps = [split, {**table["pre_tokenizer"], "use_regex": False}]
        table["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    table["model"] |= model
    return JsonTokenizer(json.dumps(table))


@pytest.fixture(scope="module")
def pairs() -> list[tuple[JsonTokenizer, BpeEncoder]]:
    """References, and the compiled encoders of the same."""
    made = [tokenizer(0), tokenizer(1, ignore_merges=True), tokenizer(2)]
    return [(reference, BpeEncoder(read_model(reference.content), reference.eos_id)) for reference in made]


def pack(texts: list[str]) -> Texts:
    data = [text.encode() for text in texts]
    bounds = np.cumsum([7, *map(len, data)], dtype=np.int64)
    return Texts(np.frombuffer(b"\xffbefore" + b"".join(data) + b"after", dtype=np.uint8), bounds)


def ids_of(encoder: BpeEncoder, texts: list[str]) -> list[list[int]]:
    ids, bounds = encoder.encode(pack(texts))
    return [ids[start:stop].tolist() for start, stop in zip(bounds, bounds[1:], strict=False)]


def expected(reference: JsonTokenizer, texts: list[str]) -> list[list[int]]:
    return [[*ids.tolist(), reference.eos_id] for ids in reference.encode_batch(texts)]


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(st.lists(TEXT, min_size=1, max_size=4))
@example(
    [
        "",
        " ",
        "\n",
        "  a",
        "a  ",
        " \n x",
        "x \n \n  ",
        "<|endoftext|>",
        "A\u0301BC",
        "\u0301ABC",
        "\u0301\u0301",
    ]
)
@example(
    ["ABCʰDE", "漢A", "A漢", "aʰ漢b", "ABC'S", "Abc'llo", "1234'd", "'1", " 's", "\r\r\na", "!\r\n/x", "a\tb"]
)
def test_ids_are_the_reference_tokenizers(pairs, texts):
    for reference, encoder in pairs:
        assert ids_of(encoder, texts) == expected(reference, texts)


def test_every_character_of_the_first_planes(pairs):
    codes = np.setdiff1d(np.arange(0x20000), np.arange(0xD800, 0xE000))
    mixed = "".join(map(chr, np.random.default_rng(0).permutation(codes).tolist()))
    for reference, encoder in pairs:
        assert ids_of(encoder, [mixed]) == expected(reference, [mixed])


def test_a_million_letters_are_one_pre_token_and_no_trouble(pairs):
    reference, encoder = pairs[0]
    text = "a" * 1_000_000
    began = time.process_time()
    encoder.encode(pack([text, "b", " " * 1_000_000]))
    assert time.process_time() - began < 5
    assert encoder.widest.tolist() == [1_000_000, 1, 1_000_000]
    texts = [text[:20_000], " " * 20_001 + "x"]
    assert ids_of(encoder, texts) == expected(reference, texts)


def test_a_small_table_that_fills_again_and_again(pairs):
    reference, _ = pairs[0]
    encoder = BpeEncoder(read_model(reference.content), reference.eos_id, slots=16)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abé漢"), size)) for size in rng.integers(1, 40, 300).tolist()]
    text = " ".join(rng.choice(words, 3000).tolist())
    assert ids_of(encoder, [text, text]) == expected(reference, [text, text])


def test_an_equal_hash_is_not_taken_for_an_equal_key():
    table = empty_table(16, 256, 64)
    keys = np.frombuffer(
        b"twenty letters of one" + b"twenty letters of two" + bytes(PADDING), np.uint8
    ).copy()
    words, size = (np.uint64(1), np.uint64(2)), 21
    put(*table, keys, 0, size, *words, np.array([5, 6], np.int32), 2)
    assert table.slots[find(*table[:2], keys, 0, size, *words), 2] != 0
    assert table.slots[find(*table[:2], keys, size, size, *words), 2] == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizes text"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "is a WordPiece model"),
        ({"model": {"dropout": 0.1}}, "has dropout=0.1"),
        ({"model": {"vocab": {"a": 0}}}, "no token for the byte 0x00"),
        ({"added_tokens": [{"content": "<pad>", "special": False}]}, "finds its added token '<pad>'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "ends its pre-tokenizer with Whitespace"),
        ({"pre_tokenizer": None}, "ends its pre-tokenizer with None"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "adds a space"),
    ],
)
def test_what_is_not_known_to_the_letter_is_left_to_the_reference(change, reason):
    table = json.loads(tokenizer(0).content)
    for key, value in change.items():
        is_partial = key == "model" and "type" not in value
        table[key] = {**table[key], **value} if is_partial else value
    with pytest.raises(Unknown, match=reason):
        read_model(json.dumps(table))


def test_another_expression_is_left_to_the_reference():
    content = tokenizer(1).content.replace(json.dumps(PATTERNS[1])[1:-1], json.dumps(r"\\w+|\\W+")[1:-1])
    with pytest.raises(Unknown, match="splits text by another expression"):
        read_model(content)
