"""Near-dup against brute force over all pairs, and against copies planted with known similarity."""

from __future__ import annotations

import random
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_tools.dedup import near
from data_tools.dedup.clusters import Sets, cluster
from data_tools.dedup.minhash import band_hashes
from data_tools.dedup.near import NearSettings, run, shingle_sets
from data_tools.dedup.shingles import mixed
from data_tools.documents import SCHEMA, texts
from data_tools.flow import Flow
from data_tools.step import read_report
from megalite.errors import DataError
from tests.data_tools.corpora import crew, rows_of, write_rows
from tests.data_tools.plain_words import jaccard, joined, shingles_of
from tests.data_tools.planted import plant

pytestmark = pytest.mark.usefixtures("no_fsync")
SCORED = SCHEMA.append(pa.field("score", pa.float32()))
Document = tuple[str, float | None]


@st.composite
def corpora(draw: st.DrawFn) -> list[list[Document]]:
    """Parts of documents, many of them edited copies of earlier ones; each with a score."""
    noise = draw(st.randoms(use_true_random=False))
    documents: list[list[str]] = []
    for _ in range(draw(st.integers(1, 14))):
        if documents and noise.random() < 0.7:
            words = list(noise.choice(documents))
            for _ in range(noise.randrange(4)):
                words[noise.randrange(len(words)) : noise.randrange(len(words)) + 1] = [
                    noise.choice("xyz漢字")
                ]
        else:
            words = [noise.choice(("a", "b", "Cc", "漢字", "é", "1")) for _ in range(noise.randrange(1, 60))]
        documents.append(words or ["a"])
    rows = [
        (noise.choice((" ", "\n", "\0 ")).join(words), noise.choice((None, float("nan"), 0.5, 2.0)))
        for words in documents
    ]
    cut = noise.randrange(len(rows) + 1)
    return [rows[:cut], rows[cut:], [(" ", 1.0), ("", 9.0), ("\n\u2028", None)]]


def dedup(parts: list[list[Document]], folder: Path, values: dict[str, Any]) -> Flow:
    """A whole step; its output is in out/."""
    rows = [
        [
            {"id": f"{p}-{r}", "source": "s", "text": text, "score": score}
            for r, (text, score) in enumerate(part)
        ]
        for p, part in enumerate(parts)
    ]
    source = write_rows(folder / "in", rows, SCORED)
    with crew(folder / "out") as hands:
        return run(NearSettings(**values), source, folder / "out", hands)


def plain(parts: list[list[Document]], choice: NearSettings) -> tuple[list[str], int]:
    """The ids that stay, by comparing all pairs that share a band; and of how many documents those are."""
    rows = [(f"{p}-{r}", *row) for p, part in enumerate(parts) for r, row in enumerate(part)]
    sets = [shingles_of(text, choice.shingle_words) for _, text, _ in rows]
    column = texts(pa.array([text for _, text, _ in rows], pa.string()))
    hashes, bounds = shingle_sets(choice, column, np.arange(len(rows)))
    bands = band_hashes(hashes, bounds[:-1], bounds[1:], choice.bands, choice.rows, choice.seed)
    pairs = [
        (one, other)
        for one, other in combinations(range(len(rows)), 2)
        if sets[one] and sets[other] and (bands[one] == bands[other]).any()
    ]
    alike = [(one, other) for one, other in pairs if jaccard(sets[one], sets[other]) >= choice.threshold]
    roots = joined(len(rows), alike)

    def rank(number: int) -> tuple[float, int]:
        _, text, score = rows[number]
        known = -float("inf") if score is None or score != score else score
        value = {"first": 0.0, "longest": len(text.encode()), "best": known}[choice.keep]
        return value, -number

    kept = [
        rows[number][0]
        for number in range(len(rows))
        if number == max((other for other in range(len(rows)) if roots[other] == roots[number]), key=rank)
    ]
    return kept, len({number for pair in pairs for number in pair})


@settings(deadline=None, max_examples=12)
@given(
    corpora(),
    st.sampled_from(["longest", "best", "first"]),
    st.sampled_from([0.3, 0.6, 0.8, 1.0]),
    st.sampled_from([1 << 10, 1 << 30]),
)
def test_those_stay_that_brute_force_keeps(
    parts: list[list[Document]], keep: str, threshold: float, memory: int
) -> None:
    column = "score" if keep == "best" else None
    values = {
        "keep": keep,
        "best_column": column,
        "threshold": threshold,
        "memory_bytes": memory,
        "bands": 8,
        "rows": 2,
        "seed": 3,
    }
    # So few components at once that there are several such lots, as of millions.
    with tempfile.TemporaryDirectory() as folder, patch.object(near, "_AT_ONCE", 3):
        flow = dedup(parts, Path(folder), values)
        kept = [row["id"] for row in rows_of(Path(folder) / "out")]
    assert (kept, flow.counters["candidates"]) == plain(parts, NearSettings(**values))
    assert flow.totals()[:2] == (sum(map(len, parts)), len(kept))


def test_a_missing_score_is_the_least(tmp_path: Path) -> None:
    nan = float("nan")
    scores = {"a": (None, nan, -1.0), "b": (nan, None), "c": (None, nan)}
    rows = [(f"{name} text of few words", score) for name, some in scores.items() for score in some]
    dedup([rows], tmp_path, {"keep": "best", "best_column": "score"})
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["0-2", "0-3", "0-5"]


def test_planted_copies_are_found_and_nothing_else(tmp_path: Path) -> None:
    draw = random.Random(3)
    vocabulary = ["".join(draw.choices("abcdefghijklmno", k=draw.randrange(2, 9))) for _ in range(900)]
    originals = [" ".join(draw.choices(vocabulary, k=draw.randrange(60, 300))) for _ in range(240)]
    copies = plant(originals, 240, seed=4)
    assert {copy.jaccard for copy in copies if copy.kind in ("exact", "spacing")} == {1.0}
    assert min(copy.jaccard for copy in copies) < 0.6
    parts = [[(text, None) for text in originals], [(copy.text, None) for copy in copies]]
    flow = dedup(parts, tmp_path, {"keep": "first"})
    kept = {row["id"] for row in rows_of(tmp_path / "out")}
    assert {f"0-{number}" for number in range(240)} <= kept
    found = [f"1-{number}" not in kept for number in range(len(copies))]
    assert not any(hit for hit, copy in zip(found, copies, strict=True) if copy.jaccard < 0.8)
    alike = [hit for hit, copy in zip(found, copies, strict=True) if copy.jaccard >= 0.8]
    assert np.mean(alike) > 0.97
    assert flow.examples["near duplicate"][0]["why"].startswith("Jaccard ")
    assert sum(flow.histograms["Jaccard of the removed with the kept"].values()) == sum(found)
    originals_of = {copy.of for hit, copy in zip(found, copies, strict=True) if hit}
    assert flow.counters["clusters"] == len(originals_of)
    chance = read_report(tmp_path / "out")["chance_to_be_compared_at_threshold"]
    assert chance == round(1 - (1 - 0.8**8) ** 14, 4)
    assert flow.counters["removed that are alike to the kept only through others"] == 0
    number = next(n for n, hit in enumerate(found) if hit)
    assert flow.examples["near duplicate"][0] == {
        "source": "s",
        "id": f"1-{number}",
        "text": copies[number].text[:300],
        "why": f"Jaccard {copies[number].jaccard:.3f} with 0-{copies[number].of}",
    }


def test_alike_by_exactly_the_threshold_is_alike(tmp_path: Path) -> None:
    flow = dedup([[("a b c d e f", None)] * 2], tmp_path, {"threshold": 1.0})
    assert flow.totals()[:2] == (2, 1)
    assert flow.counters["removed that are alike to the kept only through others"] == 0


@pytest.mark.parametrize("seed", [0, 7])
def test_bands_are_minima_of_permutations_mixed(seed: int) -> None:
    bands, rows = 3, 5
    draws = np.random.Generator(np.random.Philox(seed)).integers(0, 2**32, (2, 15), dtype=np.uint32)
    sets = [[], [5 << 32], [number * 0x9E3779B97F4A7C15 % 2**64 for number in range(1, 12)]]
    expected = []
    for some in sets:
        least = [
            min([(int(factor | 1) * (one >> 32) + int(term)) % 2**32 for one in some], default=2**32 - 1)
            for factor, term in draws.T
        ]
        for band in range(bands):
            value = np.uint64(band)
            for one in least[band * rows : (band + 1) * rows]:
                value = np.uint64(mixed(value ^ np.uint64(one)))
            expected.append(int(value))
    ends = np.cumsum([len(some) for some in sets])
    members = np.array([one for some in sets for one in some], dtype=np.uint64)
    found = band_hashes(members, ends - [len(some) for some in sets], ends, bands, rows, seed)
    assert found.ravel().tolist() == expected


def test_what_the_limit_leaves_out_is_counted() -> None:
    # All share a band; none is like another; each has its own second band.
    number, limit = 30, 4
    sets = Sets(
        np.arange(number * 2, dtype=np.uint64), np.arange(0, number * 2, 2), np.arange(2, number * 2 + 2, 2)
    )
    bands = np.stack([np.full(number, 7), np.arange(100, 100 + number)], axis=1).astype(np.uint64)
    full = cluster(sets, bands, 0.5, 1000)
    assert (full.compared, full.alike, full.left_out) == (number * (number - 1) // 2, 0, 0)
    some = cluster(sets, bands, 0.5, limit)
    assert some.compared + some.left_out == full.compared
    assert some.compared == sum(min(place, limit) for place in range(number))
    equal = Sets(sets.members, np.zeros(number, dtype=np.int64), np.full(number, 2))
    joined_up = cluster(equal, bands, 0.5, limit)
    assert (joined_up.compared, joined_up.left_out, set(joined_up.roots.tolist())) == (number - 1, 0, {0})


def test_a_column_to_keep_the_best_by_must_be_there_and_a_number(tmp_path: Path) -> None:
    for name in ("quality", "text"):
        with pytest.raises(DataError, match=f"near.best_column: .* no column of numbers {name!r}"):
            dedup([[("a b c", 1.0)]], tmp_path / name, {"keep": "best", "best_column": name})
    with pytest.raises(ValidationError, match='goes with keep = "best"'):
        NearSettings(best_column="score")
    with pytest.raises(ValidationError, match="bands=900 x rows=8 hashes; at most 4096"):
        NearSettings(bands=900)
