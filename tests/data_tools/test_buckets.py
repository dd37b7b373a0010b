"""Buckets against a plain reference, whatever the parts."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.documents import SCHEMA, PartWriter
from data_tools.mix.buckets import BucketSettings, _value, order_keys, run
from data_tools.step import read_report
from megalite.errors import DataError
from tests.data_tools.corpora import crew, files_of, rows_of, write_rows

SCORED = SCHEMA.append(pa.field("quality", pa.float64())).append(pa.field("level", pa.int32()))


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    found = []
    for n in range(count):
        source = rng.choice(["web", "books.en", "漢字"])
        text = rng.choice(["", " ", "é", "漢", "\r\n", "word\u2028"]) * rng.randrange(1, 60)
        quality = rng.choice([None, math.nan, -0.0, 0.0, -1.5, rng.gauss(0, 1e3), rng.random()])
        found.append({"id": f"{n}", "source": source, "text": text, "meta": None, "quality": quality})
        found[-1]["level"] = rng.randrange(5)
    return found


def reference(row: dict[str, Any], everything: list[dict[str, Any]], by: str, num_buckets: int) -> str:
    def number(row: dict[str, Any]) -> float:
        value = len(row["text"].encode()) if by == "length" else row[by]
        return -math.inf if value is None or math.isnan(value) else value

    mine = sorted((number(r), len(r["text"].encode())) for r in everything if r["source"] == row["source"])
    total = sum(size for _, size in mine)
    below = 0
    for j in range(1, num_buckets):
        bound = next(v for v, _ in mine if sum(s for w, s in mine if w <= v) >= total * j // num_buckets)
        below += bound < number(row)
    return f"q{below}"


@pytest.mark.parametrize("by", ["length", "quality", "level"])
def test_buckets_are_those_of_the_plain_reference(tmp_path: Path, by: str) -> None:
    everything = rows(150)
    source = write_rows(tmp_path / "in", [everything[:60], [], everything[60:61], everything[61:]], SCORED)
    settings = BucketSettings(by=by, num_buckets=4)
    with crew(tmp_path) as hands:
        flow = run(settings, source, tmp_path / "out", hands)
    found = rows_of(tmp_path / "out")
    assert [{k: v for k, v in row.items() if k not in ("bucket", "quality")} for row in found] == [
        {k: v for k, v in row.items() if k != "quality"} for row in everything
    ]
    assert [row["bucket"] for row in found] == [reference(row, everything, by, 4) for row in everything]
    assert len({row["bucket"] for row in found if row["source"] == "web"}) >= 3
    assert flow.totals()[:2] == (150, 150)
    without = sum(r["quality"] is None or math.isnan(r["quality"]) for r in everything) * (by == "quality")
    assert flow.counters["documents without a number, in q0"] == without
    counted = [n for name, n in flow.counters.items() if name.startswith("documents in ")]
    assert sum(counted) == 150
    assert len(read_report(tmp_path / "out")["upper_bounds"]["web"]) == 3


def test_the_cut_into_parts_and_the_ranks_do_not_matter(tmp_path: Path) -> None:
    everything, by = rows(80), BucketSettings(by="quality")
    one = write_rows(tmp_path / "one", [everything], SCORED)
    many = write_rows(tmp_path / "many", [everything[n : n + 9] for n in range(0, 80, 9)], SCORED)

    def work(source: Path, out: Path, rank: int, world: int) -> None:
        with crew(out.parent, rank=rank, world=world) as hands:
            run(by, source, out, hands)

    work(one, tmp_path / "a" / "out", 0, 1)
    work(many, tmp_path / "b" / "out", 0, 1)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: work(many, tmp_path / "c" / "out", rank, 2), range(2)))
    found = [[row["bucket"] for row in rows_of(tmp_path / name / "out")] for name in "abc"]
    assert found[0] == found[1] == found[2]
    before = files_of(tmp_path / "b" / "out")
    assert files_of(tmp_path / "c" / "out") == before
    work(many, tmp_path / "b" / "out", 0, 1)
    assert files_of(tmp_path / "b" / "out") == before


def test_a_source_whose_documents_are_all_alike_has_one_bucket(tmp_path: Path) -> None:
    alike = [{"id": str(n), "source": "s", "text": "same", "meta": None, "level": 3} for n in range(9)]
    source = write_rows(tmp_path / "in", [alike], SCORED)
    with crew(tmp_path) as hands:
        run(BucketSettings(by="level", num_buckets=7), source, tmp_path / "out", hands)
    assert {row["bucket"] for row in rows_of(tmp_path / "out")} == {"q0"}


@pytest.mark.parametrize(
    ("by", "words"),
    [
        ("qualty", r"'qualty'; did you mean 'quality'\?"),
        ("meta", "buckets.by: .* no column of numbers 'meta'"),
    ],
)
def test_a_column_that_cannot_be_used(tmp_path: Path, by: str, words: str) -> None:
    source = write_rows(tmp_path / "in", [rows(3)], SCORED)
    with crew(tmp_path) as hands, pytest.raises(DataError, match=words):
        run(BucketSettings(by=by), source, tmp_path / "out", hands)


def test_a_part_unlike_the_others_is_named(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in", [rows(3), rows(3)], SCORED)
    odd = SCORED.set(SCORED.get_field_index("quality"), pa.field("quality", pa.string()))
    with PartWriter(source / "parts/part-000001.parquet", odd) as writer:
        writer.write(pa.RecordBatch.from_pylist([], odd))
    message = r"buckets\.by: .*part-000001\.parquet has no column of numbers 'quality'"
    with crew(tmp_path) as hands, pytest.raises(DataError, match=message):
        run(BucketSettings(by="quality"), source, tmp_path / "out", hands)


@given(st.lists(st.floats(allow_nan=False), min_size=2, max_size=2).map(sorted))
def test_keys_are_in_the_order_of_the_numbers(pair: list[float]) -> None:
    low, high = (int(key) for key in order_keys(np.array(pair)))
    assert low <= high
    least = _value(low)
    assert math.isinf(pair[0]) if least is None else least <= pair[0]
    if pair[1] - pair[0] > 1e-6 * max(map(abs, pair)):
        assert low < high
