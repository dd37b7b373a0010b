"""The filter's verdicts and counts against plain Python; what is misspelt is refused before work starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data_tools.bins import binned, lower_ends, quantiles_of
from data_tools.documents import SCHEMA
from data_tools.filter import FilterSettings, preview, run
from data_tools.flow import Flow
from data_tools.step import read_report
from megalite.errors import DataError
from tests.data_tools.corpora import crew, files_of, rows_of, write_rows

WITH_STATISTICS = pa.schema(
    [
        *SCHEMA,
        pa.field("language", pa.string()),
        pa.field("quality", pa.float64()),
        pa.field("fineweb_terminal_lines", pa.float32()),
        pa.field("fineweb_short_lines", pa.float32()),
        pa.field("fineweb_duplicate_line_chars", pa.float32()),
        pa.field("fineweb_newlines_per_word", pa.float32()),
    ]
)
ONLY_FINEWEB: dict[str, Any] = {"gopher_quality": False, "gopher_repetition": False, "c4": False}


def row(number: int, **columns: Any) -> dict[str, Any]:
    """A document that passes every rule but for the columns given."""
    passing = {
        "fineweb_terminal_lines": 0.5,
        "fineweb_short_lines": 0.0,
        "fineweb_duplicate_line_chars": 0.0,
        "fineweb_newlines_per_word": 0.1,
    }
    base = {"id": f"d{number}", "source": f"s{number % 2}", "text": f"text {number}", "language": "en"}
    return {**base, "quality": 0.5, **passing, **columns}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Eight documents in two parts."""
    parts = [
        [
            row(0),
            row(1, fineweb_terminal_lines=0.1),
            # The threshold itself passes, in 32 bits too.
            row(2, fineweb_terminal_lines=0.12, fineweb_short_lines=0.67),
            row(3, fineweb_terminal_lines=0.0, fineweb_short_lines=0.9),
        ],
        [
            row(4, language="de"),
            row(5, quality=-2.0),
            row(6, quality=None),
            row(7, language=None, fineweb_newlines_per_word=7.0),
        ],
    ]
    return write_rows(tmp_path / "clean", parts, WITH_STATISTICS)


def filtered(source: Path, out: Path, **settings: Any) -> Flow:
    """Run the filter with FineWeb's rules and what is given."""
    with crew(out) as workers:
        return run(FilterSettings(**{**ONLY_FINEWEB, **settings}), source, out, workers)


def test_documents_are_dropped_for_the_first_rule_they_fail(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "filter"
    flow = filtered(source, out, languages=("en",), thresholds={"quality": (0.25, 1.0)})
    assert [kept["id"] for kept in rows_of(out)] == ["d0", "d2", "d6"]
    assert flow.dropped() == {
        "fineweb_terminal_lines": 2,
        "language": 2,
        "quality": 1,
    }
    rules = {rule["name"]: rule for rule in read_report(out)["rules"]}
    assert next(iter(rules)) == "language"
    assert list(rules)[-1] == "quality"
    counts = {name: (rule["failed"], rule["alone"], rule["dropped"]) for name, rule in rules.items()}
    assert counts["language"] == (2, 1, 2)
    assert counts["fineweb_terminal_lines"] == (2, 1, 2)
    assert counts["fineweb_short_lines"] == (1, 0, 0)
    assert counts["fineweb_newlines_per_word"] == (1, 0, 0)
    assert counts["quality"] == (1, 1, 1)
    assert rules["quality"]["unmeasured"] == 1
    why = {item["id"]: item["why"] for items in flow.examples.values() for item in items}
    assert why["d1"] == "0.1, not 0.12 to 1"
    assert why["d4"] == "de, not en"
    json.dumps(read_report(out), allow_nan=False)


def test_other_thresholds_need_no_new_statistics(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "loose"
    filtered(source, out, thresholds={"fineweb_terminal_lines": (0.0, 1.0)}, without=("fineweb_short_lines",))
    assert [kept["id"] for kept in rows_of(out)] == ["d0", "d1", "d2", "d3", "d4", "d5", "d6"]
    assert filtered(
        source, out, thresholds={"fineweb_terminal_lines": (0.0, 1.0)}, without=("fineweb_short_lines",)
    ).totals()[:2] == (8, 7)


def test_sizes_and_dropped_columns(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "sizes"
    flow = filtered(source, out, fineweb=False, min_bytes=7, keep_statistics=False)
    assert flow.dropped() == {"text_bytes": 8}
    flow = filtered(source, tmp_path / "more", fineweb=False, min_bytes=6, max_bytes=6, keep_statistics=False)
    assert flow.totals()[:2] == (8, 8)
    assert list(rows_of(tmp_path / "more")[0]) == [*SCHEMA.names, "language", "quality"]


def test_a_preview_tells_what_a_run_does(source: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"languages": ("en",), "thresholds": {"quality": (0.0, 1.0)}, "min_bytes": 2}
    seen = preview(FilterSettings(**ONLY_FINEWEB, **settings), source)
    out = tmp_path / "filter"
    flow = filtered(source, out, **settings)
    assert (seen.documents, seen.kept) == flow.totals()[:2]
    assert {count.rule.name: count.dropped for count in seen.rules if count.dropped} == flow.dropped()
    told = [(rule["name"], rule["failed"], rule["alone"]) for rule in read_report(out)["rules"]]
    assert [(count.rule.name, count.failed, count.alone) for count in seen.rules] == told
    assert "keeps 3 of 8 documents (37.5%)" in seen.summary()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholds": {"qualty": (0, 1)}}, r"no column of numbers 'qualty'; did you mean 'quality'\?"),
        ({"thresholds": {"language": (0, 1)}}, "no column of numbers 'language'"),
        ({"without": ("fineweb_short_line",)}, r"did you mean 'fineweb_short_lines'\?"),
        ({"gopher_quality": True}, "filter.gopher_quality needs the column gopher_words"),
    ],
)
def test_what_is_misspelt_is_refused(
    source: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        filtered(source, tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "step.json").exists()


def test_bounds_are_in_order() -> None:
    with pytest.raises(ValueError, match="the least comes first"):
        FilterSettings(thresholds={"quality": (1.0, 0.0)})
    with pytest.raises(ValueError, match="the least comes first"):
        FilterSettings(thresholds={"quality": (0.0, float("nan"))})


def test_no_documents_and_no_rules(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "empty", [[], [row(0)]], WITH_STATISTICS)
    assert filtered(source, tmp_path / "out", fineweb=False).totals()[:2] == (1, 1)
    assert filtered(write_rows(tmp_path / "nothing", []), tmp_path / "none").totals()[:2] == (0, 0)


def test_a_step_done_again_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    filtered(source, tmp_path / "a")
    filtered(source, tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_bins_hold_each_number_and_bound_its_error() -> None:
    ends, labels = lower_ends()
    assert sorted(ends) == list(ends)
    assert len(set(labels)) == len(labels)
    values = np.concatenate(
        [np.logspace(-3, 9, 1000), -np.logspace(-3, 9, 1000), [0.0, np.nan, 1e300, -1e300]]
    )
    assert sum(binned(values).values()) == values.size - 1
    for value in values[:1000]:
        (label,) = binned(np.array([value]))
        assert float(label) <= value < 1.11 * float(label) + 1e-9
    assert binned(np.array([0.1, 0.7], np.float32)) == {"0.1": 1, "0.7": 1}
    assert binned(np.zeros(0)) == {}
    assert quantiles_of(binned(np.arange(100.0)), (1, 50, 99)) == {"1%": 0.0, "50%": 48.0, "99%": 95.0}
