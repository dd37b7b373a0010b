"""Normalisation against plain regular expressions, `unicodedata` and ftfy itself."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

import ftfy
import numpy as np
import pyarrow as pa
import pytest
from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools import mojibake
from data_tools.flow import Flow
from data_tools.mojibake import signs
from data_tools.normalise import MOJIBAKE, Normalise, NormaliseSettings

WHITE = " \t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u1aaf\ua9e0-\ua9ff\uaa60-\uaadf"
GONE = "\xad\u2060\u206a-\u206f\ufeff\ufff9-\ufffc\ufdd0-\ufdef\ufffe\uffff\U0001fffe"

DEFAULT = NormaliseSettings()
OTHER = NormaliseSettings(form="NFKC", max_blank_lines=0)
LITTLE = NormaliseSettings(
    form="none", mojibake=False, invisible=False, plain_spaces=False, trailing_spaces=False, max_blank_lines=1
)

PIECES = [
    *(
        "a",
        "B",
        "é",
        "e\u0301",
        "\u0301",
        "\u0327",
        "漢",
        "カ\u3099",
        "한",
        "\u1112\u1161",
        "ﬁ",
        "①",
        "😀",
        "\u200d",
    ),
    *(
        " ",
        "  ",
        "\t",
        "\xa0",
        "\u2009",
        "\u3000",
        "\n",
        "\n\n",
        "\n\n\n",
        "\r\n",
        "\r",
        "\f",
        "\u2028",
        "\x85",
    ),
    *(
        "\0",
        "\x07",
        "\x7f",
        "\x1b[1;31m",
        "\x1b[",
        "\x1b",
        "\ufeff",
        "\xad",
        "\u200b",
        "\u200c",
        "\u2060",
        "\uffff",
    ),
    *(
        "ก\u200bข",
        "\u17d2\u200b",
        "Ã©",
        "â€œ",
        "â€\x9d",
        "Ã ",
        "Ã",
        "©",
        "ï»¿",
        "Ð¿Ñ€Ð¸",
        "\x93",
        "œ",
        "×²",
        "\ufffd",
    ),
]
texts = st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8"), max_size=12).map("".join)


def batch_of(rows: Sequence[str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"text": pa.array(rows, pa.string())})


def normalised(rows: Sequence[str], section: NormaliseSettings = DEFAULT) -> list[str]:
    return Normalise(section)(batch_of(rows), Flow()).column("text").to_pylist()


def once(text: str, section: NormaliseSettings) -> str:
    if section.mojibake:
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        if any(is_bad(line) for line in lines):
            text = "\n".join(map(ftfy.fix_encoding, lines))
    text = re.sub("\x1b\\[[\x20-\x3f]*[\x40-\x7e]", "", text)
    text = re.sub("\r\n|[\r\v\f\x85\u2028\u2029]", "\n", text)
    text = re.sub("[\0-\x08\x0e-\x1f\x7f-\x9f]", "", text)
    if section.invisible:
        text = re.sub(f"[{GONE}]", "", text)
        text = re.sub(f"(?<![{UNSPACED}])\u200b", "", text)
    if section.plain_spaces:
        text = re.sub("[\xa0\u2000-\u200a\u202f\u205f]", " ", text)
    if section.trailing_spaces:
        text = re.sub(f"[{WHITE}]+(?=\n|\\Z)", "", text)
    most = "\n" * (section.max_blank_lines + 1)
    text = re.sub(f"{most}\n+", most, text)
    return text if section.form == "none" else unicodedata.normalize(section.form, text)


def reference(text: str, section: NormaliseSettings) -> str:
    while (changed := once(text, section)) != text:
        text = changed
    return text


@pytest.mark.parametrize("section", [DEFAULT, OTHER, LITTLE], ids=["default", "other", "little"])
@settings(deadline=None, max_examples=150)
@given(rows=st.lists(texts, max_size=4))
@example(rows=["", " ", "\n\n\n\n", "e\0\u0301", "Ã\0©", "\ufeff", "a\u3000\n", "\r\n\r\n\r\n\r\n"])
def test_it_is_what_plain_expressions_do(section: NormaliseSettings, rows: list[str]) -> None:
    found = normalised(rows, section)
    assert found == [reference(text, section) for text in rows]
    assert normalised(found, section) == found


def test_what_is_normal_is_not_copied() -> None:
    batch = batch_of(["plain", "", "naïve café\n\n\nщи 漢字 👨‍👩‍👧 می‌خواهم", "„Wort“ « mot »\n"])
    flow = Flow()
    assert Normalise(DEFAULT)(batch, flow) is batch
    assert not flow.counters


def test_rules_are_counted_by_the_documents_they_changed() -> None:
    flow = Flow()
    Normalise(DEFAULT)(
        batch_of(["a\r\nb\r\nc", "e\u0301\0", "Ã©t", "x \n\n\n\n\n", "\xa0y\ufeff", "z"]), flow
    )
    assert flow.counters == {
        "normalise: line ends": 1,
        "normalise: controls": 1,
        "normalise: unicode form": 1,
        "normalise: mojibake": 1,
        "normalise: trailing spaces": 1,
        "normalise: blank lines": 1,
        "normalise: spaces": 1,
        "normalise: invisible": 1,
    }


def test_line_ends_are_not_counted_as_mojibake() -> None:
    flow = Flow()
    out = Normalise(DEFAULT)(batch_of(["café»\r\nline", "sÃ©\rok"]), flow)
    assert out.column("text").to_pylist() == ["café»\nline", "sé\nok"]
    assert flow.counters == {"normalise: line ends": 2, "normalise: mojibake": 1}


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_any_number_of_marks_in_a_row(form: Literal["NFC", "NFKC"]) -> None:
    draw = random.Random(form)
    marks = [character for character in map(chr, range(0x20000)) if unicodedata.combining(character)]
    texts = ["a" + "".join(draw.choices(marks, k=draw.randrange(300))) + "ﬁ\u0301" for _ in range(50)]
    normalise = Normalise(NormaliseSettings(form=form, mojibake=False))
    out = normalise(batch_of([*texts, "e" + "\u0301\u0327" * 200_000]), Flow()).column("text").to_pylist()
    assert out[:-1] == [unicodedata.normalize(form, text) for text in texts]
    assert out[-1] == "ȩ" + "\u0327" * 199_999 + "\u0301" * 200_000


def test_a_slice_of_a_column_is_read_where_it_lies() -> None:
    batch = batch_of(["first\0", "second\0", "third"]).slice(1)
    assert Normalise(DEFAULT)(batch, Flow()).column("text").to_pylist() == ["second", "third"]


BAD = re.findall("[" + "".join(MOJIBAKE_CATEGORIES.values()) + "]", "".join(map(chr, range(0x80, 0x10000))))


@settings(deadline=None, max_examples=400)
@given(st.text(st.sampled_from([*BAD, *" \ntTaZ.,!'1€²°œŒÂÃØÙà√≈‚вВЂГўβāΞ"]), max_size=8))
def test_every_line_ftfy_calls_bad_has_a_sign(text: str) -> None:
    found = Normalise(DEFAULT)._scan(pa.array([text], pa.string()))[0] & MOJIBAKE
    assert found or not is_bad(text)


def test_mojibake_of_every_encoding_is_repaired() -> None:
    for encoding in ("latin-1", "windows-1252", "windows-1251", "windows-1250", "macroman", "cp437"):
        for word in ("déjà vu", "„Größe“", "приветствие", "naïve — “quoted”", "日本語"):
            try:
                broken = word.encode().decode(encoding)
            except UnicodeDecodeError:
                continue
            assert normalised([broken], NormaliseSettings(plain_spaces=False)) == [
                reference(broken, NormaliseSettings(plain_spaces=False))
            ]


def test_an_unknown_ftfy_sees_every_line_that_is_not_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mojibake, "_KNOWN_EXPRESSIONS", set())
    kind, pairs = signs.__wrapped__()
    assert not kind[:0x80].any()
    assert kind[0x80:].all()
    assert pairs[0, kind[ord("é")]] == 0
    assert pairs[kind[ord("é")]].all()
    assert np.array_equal(pairs[:, 0], [0, 1])
