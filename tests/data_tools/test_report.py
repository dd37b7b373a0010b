"""The page about a corpus: every count in it, nothing of a stranger's text at work in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_tools.crew import Crew
from data_tools.flow import Flow
from data_tools.report import summary, write_report
from data_tools.step import Step
from megalite.errors import DataError
from tests.data_tools.corpora import Nothing, write_step


class Page(HTMLParser):
    """The tags of a page, and its text by cell, heading and paragraph."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def flow() -> Flow:
    """Two sources, a hostile one among them, with everything a flow can hold."""
    made = Flow()
    made.keep("books", 1000, 900)
    made.drop("<b>web", "too & short", 5, "id<script>", "<script>alert(1)</script>\x1b[31m", "5 < 50 words")
    made.count("lines <removed>", 7)
    made.tally("language", ["en", "en", "de"])
    made.tally("length", ["1024", "256"])
    return made


@pytest.fixture
def steps(tmp_path: Path) -> list[tuple[str, Path]]:
    """Two finished steps."""
    write_step(tmp_path / "ingest", [[("a", "books", "one")]])
    with Crew(tmp_path / "clean", 1) as crew:
        Step(tmp_path / "clean", "clean", 1, Nothing(), [], crew).finish([flow()], splitter="whitespace")
    return [("ingest", tmp_path / "ingest"), ("clean", tmp_path / "clean")]


def test_the_page_shows_every_count_and_runs_nothing(tmp_path: Path, steps: list[tuple[str, Path]]) -> None:
    write_report(steps, tmp_path / "report.html", "My <corpus>")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not {"script", "img", "link", "iframe", "b"} & set(page.tags)
    assert not re.search(r"(src|href)=\"(?!#)", text)
    words = " ".join(page.words)
    for shown in (
        "My <corpus>",
        "<b>web",
        "too & short: 1 (50.00%)",
        "id<script>",
        "<script>alert(1)</script>␛[31m",
        "5 < 50 words",
        "lines <removed>",
        "language",
        '"splitter": "whitespace"',
    ):
        assert shown in words
    assert page.words.index("256") < page.words.index("1024")  # numbers in their order
    assert page.words.index("en") < page.words.index("de")  # words by how many they are


def test_numbers_of_any_size_are_in_their_order(tmp_path: Path) -> None:
    some = flow()
    some.histograms = {"gopher_words": {"1e+06": 3, "1e-05": 9, "-20": 1, "0": 5, "300": 1}}
    write_step(tmp_path / "only", [])
    (tmp_path / "only/report.json").write_text(json.dumps({"step": "filter", "parts": 0, **some.to_json()}))
    write_report([("filter", tmp_path / "only")], tmp_path / "report.html", "")
    words = Page((tmp_path / "report.html").read_text()).words
    assert [word for word in words if word in some.histograms["gopher_words"]][-5:] == [
        *("-20", "0", "1e-05", "300", "1e+06")
    ]


def test_an_unfinished_step_is_refused(tmp_path: Path, steps: list[tuple[str, Path]]) -> None:
    (tmp_path / "clean/report.json").unlink()
    with pytest.raises(DataError, match="clean is not a finished step"):
        write_report(steps, tmp_path / "report.html", "My corpus")
    assert not (tmp_path / "report.html").exists()


def test_a_step_in_one_line() -> None:
    assert summary("filter", flow()) == ("filter: 2 → 1 documents, 0.0 → 0.0 MB; left out: 1 too & short")


def test_every_source_has_examples_of_its_own() -> None:
    found = Flow()
    for n in range(9):
        found.drop("a" if n < 5 else "b", "short", 1, f"d{n}", "x")
    assert [example["id"] for example in found.examples["short"]] == ["d0", "d1", "d2", "d5", "d6", "d7"]


def test_flows_merge_to_what_one_would_have_counted() -> None:
    once, twice = flow(), flow()
    twice.merge(Flow.from_json(flow().to_json()))
    assert twice.totals() == tuple(2 * count for count in once.totals())
    assert twice.counters == {"lines <removed>": 14}
    assert twice.histograms["language"] == {"en": 4, "de": 2}
    assert twice.dropped() == {"too & short": 2}
    assert len(twice.examples["too & short"]) == 2
    twice.check("twice")
