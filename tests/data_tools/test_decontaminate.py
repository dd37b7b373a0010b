"""Decontamination against sets of n-grams in plain Python, and what it says of its evaluation files."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_tools.decontaminate import DecontaminateSettings, EvaluationFile, read_items, run
from data_tools.flow import Flow
from data_tools.step import read_report
from megalite.errors import DataError
from tests.data_tools.corpora import crew, rows_of, texts_of, write_step
from tests.data_tools.plain_words import words_of

pytestmark = pytest.mark.usefixtures("no_fsync")
ITEM = [f"w{number}" for number in range(20)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[str]], list[str]]:
    """Parts of texts that hold pieces of evaluation items, and the items."""
    noise = draw(st.randoms(use_true_random=False))
    items = [[noise.choice("abcdé漢") for _ in range(noise.randrange(1, 9))] for _ in range(4)]
    parts = []
    for _ in range(2):
        part = []
        for _ in range(noise.randrange(8)):
            words = [noise.choice("abcdé漢") for _ in range(noise.randrange(12))]
            item = noise.choice(items)
            words[3:3] = item[noise.randrange(2) :]
            part.append("".join(word + noise.choice((" ", ", ", "\n\n", "\u2028")) for word in words))
        parts.append(part)
    return parts, [" ".join(item).upper() for item in items]


def clean(parts: list[list[str]], items: list[str], folder: Path, **values: Any) -> Flow:
    """A whole step; its output is in out/."""
    rows = [[(f"{p}-{r}", "s", text) for r, text in enumerate(part)] for p, part in enumerate(parts)]
    path = folder / "eval.jsonl"
    path.write_text("".join(json.dumps({"q": item}) + "\n" for item in items))
    files = [{"path": str(path), "fields": ["q"]}]
    with crew(folder / "out") as hands:
        choice = DecontaminateSettings(files=files, **values)
        return run(choice, write_step(folder / "in", rows), folder / "out", hands)


def plain(
    parts: list[list[str]], items: list[str], choice: dict[str, Any]
) -> tuple[list[str], dict[str, int]]:
    """What is left, and how many documents each item hit."""
    grams: dict[tuple[str, ...], set[int]] = {}
    for number, item in enumerate(items):
        words = tuple(word for word, _ in words_of(item))
        size = min(len(words), choice["ngram_words"])
        if size >= choice["min_words"]:
            for at in range(len(words) - size + 1):
                grams.setdefault(words[at : at + size], set()).add(number)
    left, hits = [], dict.fromkeys(range(len(items)), 0)
    for text in (text for part in parts for text in part):
        words = words_of(text)
        hit: set[int] = set()
        by: set[int] = set()
        for size in range(choice["min_words"], choice["ngram_words"] + 1):
            for at in range(len(words) - size + 1):
                if found := grams.get(tuple(word for word, _ in words[at : at + size])):
                    hit.update(range(at, at + size))
                    by |= found
        for number in by:
            hits[number] += 1
        if len(hit) <= choice["max_overlap"] * len(words):
            left.append(text)
        elif choice["mode"] == "cut" and len(words) - len(hit) >= choice["min_words_left"]:
            ends = [index for _, index in words[1:]] + [len(text)]
            cut = {place for word in hit for place in range(words[word][1], ends[word])}
            left.append("".join(character for place, character in enumerate(text) if place not in cut))
    return left, {f"line {number + 1}": count for number, count in hits.items() if count}


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(cases(), st.sampled_from(["drop", "cut"]), st.sampled_from([0.0, 0.5]))
def test_what_is_left_is_what_sets_of_ngrams_leave(case: Any, mode: str, share: float) -> None:
    parts, items = case
    choice = {"ngram_words": 5, "min_words": 3, "mode": mode, "max_overlap": share, "min_words_left": 2}
    with tempfile.TemporaryDirectory() as folder:
        clean(parts, items, Path(folder), **choice)
        left, hits = plain(parts, items, choice)
        assert texts_of(Path(folder) / "out") == left
        assert read_report(Path(folder) / "out")["evaluation"]["eval.jsonl"]["documents_hit_by"] == hits


def test_hits_are_told_by_file_and_item(tmp_path: Path) -> None:
    texts = ["Before: " + ", ".join(ITEM[3:17]) + ". After", " ".join(ITEM[3:15]), "b c d e f g h i j " * 2]
    items = ["too short", " ".join(ITEM), "B C D e f g h i"]
    flow = clean([texts[:1], texts[1:]], items, tmp_path)
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["1-0"]  # 12 words are no hit
    assert read_report(tmp_path / "out")["evaluation"] == {
        "eval.jsonl": {
            "items": 3,
            "too_short": 1,
            "items_that_hit": 2,
            "documents_hit_by": {"line 2": 1, "line 3": 1},
        }
    }
    assert [example["why"] for example in flow.examples["contaminated"]] == [
        "14 of 16 words, first of eval.jsonl line 2",
        "16 of 18 words, first of eval.jsonl line 3",
    ]


def test_files_are_told_apart_and_their_texts_make_the_step_not_their_places(tmp_path: Path) -> None:
    source = write_step(tmp_path / "in", [[("a", "s", " ".join(ITEM)), ("b", "s", "other")]])

    def hits(place: str, second: str) -> dict[str, Any]:
        (tmp_path / place).mkdir()
        (tmp_path / place / "one.txt").write_text("an item that hits nothing at all here\n\nshort")
        (tmp_path / place / "two.txt").write_text(f"never seen\n\n{second}")
        files = [{"path": str(tmp_path / place / f"{name}.txt")} for name in ("one", "two")]
        with crew(tmp_path / "out") as hands:
            run(DecontaminateSettings(files=files), source, tmp_path / "out", hands, renew=True)
        told = read_report(tmp_path / "out")["evaluation"]
        return {name: told[name]["documents_hit_by"] for name in ("one.txt", "two.txt")}

    def made() -> int:
        return (tmp_path / "out/report.json").stat().st_mtime_ns

    assert hits("here", " ".join(ITEM)) == {"one.txt": {}, "two.txt": {"paragraph 2": 1}}
    before = made()
    assert hits("there", " ".join(ITEM)) == {"one.txt": {}, "two.txt": {"paragraph 2": 1}}
    assert made() == before
    assert hits("other", "something else that no document of these has") == {"one.txt": {}, "two.txt": {}}
    assert made() != before


def test_what_many_items_share_is_told_of_each(tmp_path: Path) -> None:
    shared = " ".join(ITEM[:14])
    items = [f"{shared} {number}" for number in range(300)] + [" ".join(ITEM[2:])]
    flow = clean([[f"{shared} and", "other", f"{shared} 7"]], items, tmp_path)
    told = read_report(tmp_path / "out")["evaluation"]["eval.jsonl"]
    assert told["documents_hit_by"] == {f"line {number + 1}": 2 for number in range(300)}
    assert [example["why"] for example in flow.examples["contaminated"]] == [
        "14 of 15 words, first of eval.jsonl line 1",
        "15 of 15 words, first of eval.jsonl line 1",
    ]


def test_a_part_is_cut_out_and_the_rest_stays(tmp_path: Path) -> None:
    text = "Before: " + ", ".join(ITEM) + ". After"
    flow = clean([[text, " ".join(ITEM)]], [" ".join(ITEM)], tmp_path, mode="cut", min_words_left=1)
    assert texts_of(tmp_path / "out") == ["Before: After"]
    assert flow.examples["evaluation text"][0]["text"] == ", ".join(ITEM) + ". "
    assert flow.sources["s"]["dropped"]["too few words left"]["documents"] == 1


@pytest.mark.parametrize(("least", "number"), [(12, 2), (13, 1)])
def test_the_share_let_pass_and_the_words_left_are_bounds_that_hold(
    tmp_path: Path, least: int, number: int
) -> None:
    half = " ".join([*ITEM[:13], *(f"x{n}" for n in range(13))])
    rest = " ".join(f"y{n}" for n in range(12))
    more = f"{' '.join(ITEM[:13])} {rest}"
    choice = {"mode": "cut", "max_overlap": 0.5, "min_words_left": least}
    flow = clean([[half, more]], [" ".join(ITEM)], tmp_path, **choice)
    assert texts_of(tmp_path / "out") == [half, rest][:number]
    assert flow.counters["documents with hits that were let pass"] == 1


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("a.jsonl", b'{"q": "x"}\n{"q": 1}\n', ["q"], r"a\.jsonl:2 has no text in q; its fields are q"),
        ("a.jsonl", b'{"q": "x"}\n', ["q", "a"], r"a\.jsonl:1 has no text in a; its fields are q"),
        ("a.jsonl", b"\n[]\n", ["q"], r"a\.jsonl:2 is list, not an object"),
        ("a.jsonl", b"{\n", ["q"], r"a\.jsonl:1 is no JSON"),
        ("a.jsonl", b"{}\n", [], r"a\.jsonl needs fields"),
        ("a.txt", b"x", ["q"], r"a\.txt is read as text and has no fields"),
        ("a.txt", b"\xff", [], r"cannot read the evaluation file .*a\.txt"),
        ("a.txt", b"", [], r"the evaluation file .*a\.txt has no text"),
        ("a.txt", b" \n\n\t\n", [], r"the evaluation file .*a\.txt has no text"),
        ("a.jsonl", b"\n", ["q"], r"the evaluation file .*a\.jsonl has no text"),
        ("a.jsonl.gz", gzip.compress(b"{}")[:-9], ["q"], r"cannot read .*a\.jsonl\.gz: .*compressed data"),
        ("a.txt", None, [], r"cannot read the evaluation file .*a\.txt: No such file"),
    ],
)
def test_bad_evaluation_files_are_named(
    tmp_path: Path, name: str, content: bytes | None, fields: list[str], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_items(EvaluationFile(path=str(tmp_path / name), fields=fields))


def test_half_a_surrogate_pair_divides_words(tmp_path: Path) -> None:
    clean([[" ".join(ITEM)], ["other"]], [" \ud800 ".join(ITEM)], tmp_path)
    assert texts_of(tmp_path / "out") == ["other"]


def test_items_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\none\ntwo\n \t\n\nthree\n")
    assert read_items(EvaluationFile(path=str(tmp_path / "a.txt"))) == [
        ("paragraph 1", "one\ntwo"),
        ("paragraph 2", "three\n"),
    ]
    (tmp_path / "a.jsonl").write_text('\n{"q": "x", "c": ["y", "z"], "n": 1}\n')
    lines = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        found = read_items(EvaluationFile(path=str(tmp_path / name), fields=["q", "c"]))
        assert found == [("line 2", "x\ny\nz")]
    with pytest.raises(ValidationError, match=r"two evaluation files are named a\.txt"):
        DecontaminateSettings(files=[{"path": "x/a.txt"}, {"path": "y/a.txt"}])
