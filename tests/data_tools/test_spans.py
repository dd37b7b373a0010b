"""Repeated spans against brute force over all windows of words."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.dedup.spans import SpanSettings, run
from data_tools.flow import Flow
from tests.data_tools.corpora import crew, rows_of, texts_of, write_step
from tests.data_tools.plain_words import words_of

pytestmark = pytest.mark.usefixtures("no_fsync")


@st.composite
def corpora(draw: st.DrawFn) -> list[list[str]]:
    """Parts of texts put together from a few phrases, so that spans recur, overlap and repeat themselves."""
    noise = draw(st.randoms(use_true_random=False))
    word = ("a", "B", "b", "漢字", "é", "x1")
    phrases = [[noise.choice(word) for _ in range(noise.randrange(1, 14))] for _ in range(5)]
    parts = []
    for _ in range(3):
        part = []
        for _ in range(noise.randrange(6)):
            words = [
                one
                for _ in range(noise.randrange(6))
                for one in noise.choice(phrases) * noise.randrange(1, 4)
            ]
            part.append("".join(one + noise.choice((" ", ".\r\n", "\u2028", " 😀 ")) for one in words))
        parts.append(part)
    return parts


def dedup(parts: list[list[str]], folder: Path, choice: SpanSettings) -> Flow:
    """A whole step; its output is in out/."""
    rows = [[(f"{p}-{r}", "s", text) for r, text in enumerate(part)] for p, part in enumerate(parts)]
    with crew(folder / "out") as hands:
        return run(choice, write_step(folder / "in", rows), folder / "out", hands)


def plain(parts: list[list[str]], choice: SpanSettings) -> list[str]:
    """What is left, from the first place of every window."""
    size = choice.span_words
    first: dict[tuple[str, ...], tuple[int, int]] = {}
    left = []
    for number, text in enumerate(text for part in parts for text in part):
        words = words_of(text)
        repeated: set[int] = set()
        for at in range(len(words) - size + 1):
            document, place = first.setdefault(tuple(word for word, _ in words[at : at + size]), (number, at))
            if document < number or place + size <= at:
                repeated.update(range(at, at + size))
        ends = [index for _, index in words[1:]] + [len(text)]
        cut = {place for word in repeated for place in range(words[word][1], ends[word])}
        if not repeated or len(words) - len(repeated) >= choice.min_words:
            left.append("".join(character for place, character in enumerate(text) if place not in cut))
    return left


def plainly_kept(parts: list[list[str]], choice: SpanSettings) -> list[str]:
    """The texts that are not mostly windows of words of those kept before them."""
    size = choice.span_words
    kept: list[str] = []
    known: set[tuple[str, ...]] = set()
    for text in (text for part in parts for text in part):
        words = [word for word, _ in words_of(text)]
        windows = [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
        repeated = {at + n for at, window in enumerate(windows) if window in known for n in range(size)}
        if len(repeated) <= choice.max_share * len(words):
            kept.append(text)
            known.update(windows)
    return kept


@settings(deadline=None, max_examples=15)
@given(
    corpora(),
    st.sampled_from(["remove", "drop_document"]),
    st.sampled_from([8, 9, 13]),
    st.sampled_from([1 << 10, 1 << 30]),
)
def test_what_is_left_is_what_brute_force_leaves(
    parts: list[list[str]], mode: str, size: int, memory: int
) -> None:
    choice = SpanSettings(span_words=size, mode=mode, min_words=3, max_share=0.4, memory_bytes=memory)
    with tempfile.TemporaryDirectory() as folder:
        flow = dedup(parts, Path(folder), choice)
        expected = (plainly_kept if mode == "drop_document" else plain)(parts, choice)
        assert texts_of(Path(folder) / "out") == expected
        assert flow.totals()[0] == sum(map(len, parts))


def test_spans_cut_are_counted_and_shown(tmp_path: Path) -> None:
    licence = " ".join(f"word{number}" for number in range(60))
    texts = [f"First. {licence} end", f"Second, and {licence}; more of it", f"{licence}."]
    flow = dedup([texts[:2], texts[2:]], tmp_path, SpanSettings(min_words=5))
    assert [row["text"] for row in rows_of(tmp_path / "out")] == [texts[0], "Second, and more of it"]
    assert flow.counters == {"spans cut": 2, "words cut": 120, "documents with repeated spans": 2}
    assert flow.examples["repeated span"][0]["text"] == (licence + "; ")[:300]
    assert flow.examples["too few words left"][0]["why"] == "60 of 60 words occurred before"
    assert flow.sources["s"]["dropped"] == {"too few words left": {"documents": 1, "bytes": len(texts[2])}}


def test_a_document_is_dropped_only_for_spans_that_a_kept_one_has(tmp_path: Path) -> None:
    w, x, y, z = (" ".join(f"{name}{number}" for number in range(60)) for name in "wxyz")
    texts = [
        f"{x} a",
        f"{x} and {x} {y}",  # mostly x
        f"{y}",  # which only the dropped one had
        f"{y} c",
        f"{z} {z} {z}",  # nobody else's
        f"{z} d",
        f"{y} e",
        f"{x} {w}",  # no more than half
        f"{w} f",
    ]
    flow = dedup([texts[:2], texts[2:5], texts[5:6], texts[6:]], tmp_path, SpanSettings(mode="drop_document"))
    assert texts_of(tmp_path / "out") == [texts[0], texts[2], texts[4], texts[7]]
    assert flow.counters == {"documents with repeated spans": 6}
    whys = [example["why"] for example in flow.examples["repeated spans"]]
    assert whys == ["120 of 181 words occurred before"] + ["60 of 61 words occurred before"] * 2
    assert flow.sources["s"]["dropped"]["repeated spans"]["documents"] == 5
