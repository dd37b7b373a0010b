"""Every statistic against plain Python, on made text and on a real corpus if MEGALITE_CORPUS names one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools.flow import Flow
from data_tools.statistics.gopher import GopherStatistics
from data_tools.statistics.operation import Statistics, fingerprints
from data_tools.statistics.settings import StatisticsSettings
from megalite.errors import DataError
from tests.data_tools import reference_statistics as reference

SETTINGS = [
    StatisticsSettings(),
    StatisticsSettings(
        word_splitter="unicode",
        remove_lines=("no_terminal", "policy"),
        keep_paragraphs=True,
        min_line_words=2,
        max_word_chars=6,
        stop_words={"en": ("the", "of"), "de": ("der", "of")},
    ),
    StatisticsSettings(remove_lines=(), remove_citations=False),
]
PIECES = [
    *("a", "b", "The", "the", "WITH", "ab", "of", "x1", "_", "éa", "e\u0301", "漢字", "か", "ก", "ำ", "Ω"),
    *(" ", " ", " ", "\n", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x00", "\x1c", "\x85"),
    *(".", "...", "…", "?", "。", "！", '"', "”", ")", "#", "•", "-", "- ", ",", "😀", "{", "[", "]"),
    *("[1]", "[]", "[edit]", "[citation needed]", "[citation", "JavaScript", "java", "Lorem ipsum"),
    *("uses cookies", "use of cookies", "Privacy Policy", "a b c d e ", "a b c d e f g h i j k ", "İ", "ſ"),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=60).map("".join) | st.text(max_size=60)


def batch_of(texts: list[str], **columns: list[Any]) -> pa.RecordBatch:
    """A batch of documents."""
    ids = [str(number) for number in range(len(texts))]
    names = {"id": ids, "source": ["s"] * len(texts), "text": texts, **columns}
    schema = pa.schema([(name, pa.string()) for name in names])
    return pa.RecordBatch.from_pydict(names, schema)


def check(texts: list[str], chosen: StatisticsSettings) -> None:
    """Every value of every text is that of the reference, to the last bit of its column."""
    rows = Statistics(chosen)(batch_of(texts), Flow()).to_pylist()
    for text, row in zip(texts, rows, strict=True):
        edited, numbers = reference.statistics(text, chosen)
        assert row["text"] == edited
        assert set(numbers) == set(row) - {"id", "source", "text"}
        for name, number in numbers.items():
            wanted = None if number is None else np.float32(number)
            assert row[name] == wanted, (name, text)


@pytest.mark.parametrize("chosen", SETTINGS, ids=["default", "unicode", "no edits"])
@settings(deadline=None, max_examples=60)
@given(texts=st.lists(TEXTS, max_size=4))
@example(texts=[])
@example(texts=["", " ", "\n", "\n \n", "\x00", "a", "a\n", "\na", ".", "...", "😀", "\u2028"])
@example(texts=["a b c d e f. " * 30, "漢字かな。" * 40, "the " * 100, "x" * 1001 + " y z."])
def test_statistics_are_those_of_plain_python(chosen: StatisticsSettings, texts: list[str]) -> None:
    check(texts, chosen)


@pytest.mark.skipif("MEGALITE_CORPUS" not in os.environ, reason="needs MEGALITE_CORPUS, a folder of .jsonl")
@pytest.mark.parametrize("chosen", SETTINGS, ids=["default", "unicode", "no edits"])
def test_real_documents(chosen: StatisticsSettings) -> None:
    texts = []
    for path in sorted(Path(os.environ["MEGALITE_CORPUS"]).glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            found = [text for line in file if len(text := json.loads(line)["text"]) < 200_000]
        texts += found[:: max(1, len(found) // 40)][:40]
    assert len(texts) >= 400
    check(texts, chosen)


def test_top_ngram_is_the_first_of_equally_frequent_ones() -> None:
    row = GopherStatistics(StatisticsSettings())(batch_of(["aaaa b c d aaaa b c d"]), Flow()).to_pylist()[0]
    assert row["gopher_top_2gram_chars"] == pytest.approx(2 * len("aaaa b") / 21)
    assert row["gopher_duplicate_5gram_chars"] == 0


def test_stop_words_are_those_of_the_language() -> None:
    texts = ["The cat of der dog", "The cat of der dog", "The cat of der dog", "The cat"]
    batch = batch_of(texts, language=["en", "de", "fr", None])
    rows = GopherStatistics(SETTINGS[1])(batch, Flow()).to_pylist()
    assert [row["gopher_stop_words"] for row in rows] == [2, 2, None, None]
    rows = GopherStatistics(SETTINGS[1])(batch_of(texts), Flow()).to_pylist()
    assert [row["gopher_stop_words"] for row in rows] == [3, 3, 3, 1]


def test_what_c4_removes_is_counted_with_examples() -> None:
    flow = Flow()
    cookies = "We use cookies on this site."
    text = f"Please enable JavaScript to go on.\nOne line stays[1] as it is.\nHome\n\n{cookies}"
    row = Statistics(StatisticsSettings())(batch_of([text, "Menu"]), flow).to_pylist()[0]
    assert row["text"] == "One line stays as it is."
    assert flow.counters["c4: lines removed, few_words"] == 2
    assert flow.counters["c4: lines removed, javascript"] == 1
    assert flow.counters["c4: characters removed, policy"] == len(cookies)
    assert flow.counters["c4: citations removed"] == 1
    assert [item["text"] for item in flow.examples["c4 line: few_words"]] == ["Home", "Menu"]


def test_bad_words(tmp_path: Path) -> None:
    entries = ["darn", "Holy cow", "性感", "x-ray"]
    path = tmp_path / "bad.txt"
    path.write_text("\n".join([*entries, ""]), encoding="utf-8")
    texts = ["Darn, darned! HOLY  cow; holy-cow", "很性感的", "X ray, xray", "", "holy", "darn darn"]
    chosen = StatisticsSettings(bad_words=path, remove_lines=(), remove_citations=False)
    rows = Statistics(chosen)(batch_of(texts), Flow()).to_pylist()
    assert [row["c4_bad_words"] for row in rows] == [3, 1, 1, 0, 0, 2]
    assert [row["c4_bad_words"] for row in rows] == [reference.bad_words(text, entries) for text in texts]
    before = fingerprints(chosen)
    path.write_text("other", encoding="utf-8")
    assert fingerprints(chosen) != before


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), (b"\xff", "as UTF-8"), (b"a\n--\n", ":2: '--' has no letter"), (b"", "no words")],
)
def test_a_wrong_word_list_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        Statistics(StatisticsSettings(bad_words=path))


def test_a_stop_word_is_one_word() -> None:
    with pytest.raises(DataError, match="'in order' is not one word, but 2"):
        GopherStatistics(StatisticsSettings(stop_words={"en": ("in order",)}))
    with pytest.raises(ValueError, match="65 different stop words"):
        StatisticsSettings(stop_words={"en": tuple(f"w{number}" for number in range(65))})


def test_only_what_is_asked_for() -> None:
    chosen = StatisticsSettings(gopher=False, c4=False)
    out = Statistics(chosen)(batch_of(["one\n\ntwo"]), Flow())
    assert out.schema.names[:3] == ["id", "source", "text"]
    assert all(name.startswith("fineweb_") for name in out.schema.names[3:])
    assert out.column("text").to_pylist() == ["one\n\ntwo"]
