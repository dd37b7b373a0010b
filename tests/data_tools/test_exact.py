"""Exact dedup of documents, paragraphs and lines against sets in plain Python."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools.characters import SPACE, character_classes, lower_case
from data_tools.dedup.exact import ExactSettings, run
from data_tools.dedup.repeats import later_occurrences
from data_tools.flow import Flow
from tests.data_tools.corpora import crew, rows_of, texts_of, write_step

pytestmark = pytest.mark.usefixtures("no_fsync")
LINES = st.sampled_from(
    [
        "",
        " ",
        "a",
        "A ",
        "aa bb",
        " AA\t bb\r",
        "漢字カ",
        "e\u0301\u2028e",
        "\0",
        "😀 x",
        "aa  bb",
        "abcdefgh",
        "abcdefghi",
    ]
)
TEXTS = st.lists(LINES, max_size=6).map("\n".join)
CORPORA = st.lists(st.lists(TEXTS, max_size=9), min_size=2, max_size=3)


def key_of(text: str, normalise: bool) -> str:
    """What is compared of a unit, which has no space at its ends."""
    if not normalise:
        return text
    lower = "".join(chr(lower_case()[ord(character)]) for character in text)
    return re.sub(
        r"\s+", " ", "".join(" " if is_space(character) else character for character in lower)
    ).strip(" ")


def is_space(character: str) -> bool:
    """As the tables say."""
    return bool(character_classes()[ord(character)] & SPACE)


def units_of(text: str, unit: str) -> list[str]:
    """A text as stretches that joined give it again, some of them blank."""
    lines = re.findall(r"[^\n]*\n|[^\n]+$", text)
    if unit == "line":
        return lines
    paragraphs: list[str] = []
    was_blank = True
    for line in lines:
        if (line.strip() and was_blank) or not paragraphs:
            paragraphs.append("")
        paragraphs[-1] += line
        was_blank = not line.strip()
    if paragraphs and lines and not lines[0].strip() and paragraphs[0].strip():  # blank lines at the start
        blank = paragraphs[0][: len(paragraphs[0]) - len(paragraphs[0].lstrip("\n \t\r\u2028"))]
        head = blank[: blank.rfind("\n") + 1]
        paragraphs[:1] = [head, paragraphs[0][len(head) :]]
    return paragraphs


def plain(parts: list[list[str]], choice: ExactSettings) -> list[str]:
    """What is left."""
    seen: set[str] = set()
    left = []
    for text in (text for part in parts for text in part):
        if choice.unit == "document":
            key = key_of(text, choice.normalise)
            if key not in seen:
                left.append(text)
            seen.add(key)
            continue
        kept, cut = [], False
        for unit in units_of(text, choice.unit):
            key = key_of(unit.strip(), choice.normalise)
            if unit.strip() and len(unit.strip()) >= choice.min_chars and key in seen:
                cut = True
                continue
            if unit.strip() and len(unit.strip()) >= choice.min_chars:
                seen.add(key)
            kept.append(unit)
        if not cut or "".join(kept).strip():
            left.append("".join(kept))
    return left


def dedup(parts: list[list[str]], folder: Path, **values: Any) -> Flow:
    """A whole step on texts; its output is in out/."""
    rows = [[(f"{p}-{r}", "s", text) for r, text in enumerate(part)] for p, part in enumerate(parts)]
    source = write_step(folder / "in", rows)
    with crew(folder / "out") as hands:
        return run(ExactSettings(**values), source, folder / "out", hands)


@pytest.mark.parametrize("unit", ["document", "paragraph", "line"])
@pytest.mark.parametrize("normalise", [False, True])
def test_what_is_left_is_what_sets_leave(unit: str, normalise: bool) -> None:
    @settings(deadline=None, max_examples=7)
    @given(CORPORA)
    @example([["\n\n a\n\n\nb", "a\n\n b"], [], ["x\ny\n\nx\ny", " \n\nx\r\ny \n"]])
    @example([["", "abcdefgh", " ", ""], ["abcdefghi", "ABCDEFGH", "abcdefgh "]])
    @example([["abcdefg", "abcdefg\x07", "\0"], ["abcdef", "abcdef\0\6", "\0\0", "ab\nx", "ab\n\nx"]])
    def check(parts: list[list[str]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            choice = ExactSettings(unit=unit, normalise=normalise, min_chars=2)
            flow = dedup(parts, Path(folder), **choice.model_dump())
            assert texts_of(Path(folder) / "out") == plain(parts, choice)
            assert flow.totals()[0] == sum(map(len, parts))

    check()


def test_both_halves_of_a_key_count() -> None:
    draw = np.random.default_rng(0)
    records = np.stack([*draw.integers(0, 3, (2, 60)), draw.permutation(60)], axis=1)
    first: dict[tuple[int, int], int] = {}
    expected = []
    for one, other, address in sorted(records.tolist(), key=lambda record: record[2]):
        if (earliest := first.setdefault((one, other), address)) != address:
            expected.append([address, earliest])
    assert later_occurrences(records.astype(np.uint64)).tolist() == expected


def test_the_report_says_what_went_and_whose_twin_it_was(tmp_path: Path) -> None:
    flow = dedup([["same", "other"], ["more", "same"]], tmp_path)
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["0-0", "0-1", "1-0"]
    assert flow.sources["s"]["dropped"] == {"exact duplicate": {"documents": 1, "bytes": 4}}
    assert flow.examples["exact duplicate"] == [
        {"source": "s", "id": "1-1", "text": "same", "why": "same as 0-0"}
    ]


def test_lines_cut_are_counted_and_shown_and_a_document_of_nothing_else_goes(tmp_path: Path) -> None:
    flow = dedup(
        [["a menu of links\nnew\n"], ["a menu of links\n", "old\na menu of links"]],
        tmp_path,
        unit="line",
        min_chars=5,
    )
    assert texts_of(tmp_path / "out") == ["a menu of links\nnew\n", "old\n"]
    assert flow.counters == {"lines removed": 2, "bytes removed": 31, "documents cut": 2}
    assert flow.examples["repeated line"][1]["text"] == "a menu of links"
    assert flow.sources["s"]["dropped"] == {"nothing left": {"documents": 1, "bytes": 16}}
