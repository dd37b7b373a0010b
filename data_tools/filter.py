"""Drop documents by their statistics: rules on columns that `clean` measured, so that they can be changed.

A rule is a column and the numbers it may have. A document that breaks several is dropped for the first, but
each rule's failures are counted, and those no other rule shares: what it would drop if it stood alone, and
what would come back without it. `preview` tells the same from the columns alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, field_validator

from data_tools.bins import binned, quantiles_of
from data_tools.crew import Crew
from data_tools.documents import check_number, is_number, read_part, texts
from data_tools.flow import KEPT, Flow
from data_tools.step import Step, read_report, step_parts, step_schema
from megalite.config.section import Section
from megalite.errors import DataError, nearest

KIND = "filter"
VERSION = 1

Bound = Annotated[float, Field(allow_inf_nan=True)]  # inf: none
Bounds = tuple[Bound, Bound]

SIZE = "text_bytes"  # the rule on min_bytes and max_bytes
# Statistics of `clean` start so; with keep_statistics=false they go.
STATISTICS = ("gopher_", "c4_", "fineweb_")
QUANTILES = (1, 5, 25, 50, 75, 95, 99)  # per cent

_UNBOUNDED = math.inf
_TOP_SHARES = {2: 0.20, 3: 0.18, 4: 0.16}
_DUPLICATE_SHARES = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

# The papers' thresholds (Rae et al. 2021, section A.1.1 and table A1; Raffel et al. 2020, section 2.2;
# Penedo et al. 2024, section 3.5, with datatrove's 0.01 for duplicate lines). Both ends are allowed.
RULE_SETS: dict[str, dict[str, Bounds]] = {
    "gopher_quality": {
        "gopher_words": (50, 100_000),
        "gopher_mean_word_length": (3, 10),
        "gopher_hash_signs_per_word": (0, 0.1),
        "gopher_ellipses_per_word": (0, 0.1),
        "gopher_bullet_lines": (0, 0.9),
        "gopher_ellipsis_lines": (0, 0.3),
        "gopher_words_with_letter": (0.8, 1),
        "gopher_stop_words": (2, _UNBOUNDED),
    },
    "gopher_repetition": {
        "gopher_duplicate_lines": (0, 0.3),
        "gopher_duplicate_line_chars": (0, 0.2),
        "gopher_duplicate_paragraphs": (0, 0.3),
        "gopher_duplicate_paragraph_chars": (0, 0.2),
        **{f"gopher_top_{n}gram_chars": (0, most) for n, most in _TOP_SHARES.items()},
        **{f"gopher_duplicate_{n}gram_chars": (0, most) for n, most in _DUPLICATE_SHARES.items()},
    },
    "c4": {
        "c4_sentences": (5, _UNBOUNDED),
        "c4_lorem_ipsum_lines": (0, 0),
        "c4_curly_brackets": (0, 0),
        "c4_bad_words": (0, 0),
    },
    "fineweb": {
        "fineweb_terminal_lines": (0.12, 1),
        "fineweb_short_lines": (0, 0.67),
        "fineweb_duplicate_line_chars": (0, 0.01),
        "fineweb_newlines_per_word": (0, 0.3),
    },
}


class FilterSettings(Section):
    """Section `filter`: which documents stay."""

    gopher_quality: bool = Field(True, description="Gopher's rules on words and lines")
    gopher_repetition: bool = Field(True, description="Gopher's rules on repeated lines and n-grams")
    c4: bool = Field(True, description="C4's rules for documents; it takes out lines in `clean`")
    fineweb: bool = Field(True, description="FineWeb's additional rules")
    without: tuple[str, ...] = Field(
        (), strict=False, description="rules of these sets to leave out, e.g. ['c4_curly_brackets']"
    )
    thresholds: dict[str, Annotated[Bounds, Field(strict=False)]] = Field(
        {},
        description="least and most of a column, both allowed, in place of a rule's or for any other column "
        "of numbers: {gopher_words = [20, 1e6], language_score = [0.65, inf]}",
    )
    languages: tuple[str, ...] = Field(
        (), strict=False, description="values of the column `language` that stay; empty: all"
    )
    min_bytes: int | None = Field(None, ge=1, description="of UTF-8 text")
    max_bytes: int | None = Field(None, ge=1, description="of UTF-8 text")
    keep_statistics: bool = Field(True, description="keep the columns gopher_…, c4_…, fineweb_…")

    @field_validator("thresholds")
    @classmethod
    def _ordered(cls, value: dict[str, Bounds]) -> dict[str, Bounds]:
        for name, (low, high) in value.items():
            if not low <= high:
                raise ValueError(f"{name} = [{low}, {high}]: the least comes first, and neither is nan")
        return value


class Rule(NamedTuple):
    """What a document must have: a column's value between low and high, or one of `languages`."""

    name: str  # the column; or SIZE
    low: float = -_UNBOUNDED
    high: float = _UNBOUNDED
    languages: tuple[str, ...] = ()


@dataclass(frozen=True)
class RuleCount:
    """What became of a rule, in documents."""

    rule: Rule
    failed: int
    alone: int  # failed no other rule
    dropped: int  # failed none before it
    unmeasured: int  # have no such number, and pass


@dataclass(frozen=True)
class Preview:
    """What a filter would do."""

    documents: int
    kept: int
    rules: list[RuleCount]

    def summary(self) -> str:
        """A table for people."""
        share = self.kept / max(1, self.documents)
        width = max([len(count.rule.name) for count in self.rules], default=0)
        head = f"{'rule':{width}} {'failed':>12} {'alone':>12} {'dropped':>12} {'unmeasured':>12}"
        rows = [
            f"{count.rule.name:{width}} {count.failed:12,} {count.alone:12,} {count.dropped:12,} "
            f"{count.unmeasured:12,}  {_wanted(count.rule)}"
            for count in self.rules
        ]
        return "\n".join([f"keeps {self.kept:,} of {self.documents:,} documents ({share:.1%})", head, *rows])


def run(settings: FilterSettings, source: Path, out: Path, crew: Crew, renew: bool = False) -> Flow:
    """Write the documents of a finished step that keep all rules.

    The report has `rules` (see `RuleCount`) and `quantiles` by column of what came in; the flow's histograms
    have the values of each column by the lower ends of fixed bins.

    Raises:  DataError if a rule names no column of numbers of `source`, or none of the sets' rules
    """
    rules = rules_of(settings, str(source), step_schema(source))
    step = Step(out, KIND, VERSION, settings, [source], crew, renew=renew)
    if step.is_finished:
        return Flow.from_json(read_report(out))
    flows = step.map_parts(step_parts(source), partial(_filter_part, rules, settings))
    total = Flow()
    for flow in flows:
        total.merge(flow)
    counts = [_told(count) for count in _rule_counts(rules, total.counters, total.dropped())]
    quantiles = {name: quantiles_of(bins, QUANTILES) for name, bins in sorted(total.histograms.items())}
    return step.finish(flows, rules=counts, quantiles=quantiles)


def preview(settings: FilterSettings, source: Path) -> Preview:
    """What `run` would drop, from the columns that the rules look at and nothing else.

    Raises:  DataError as `run` does
    """
    parts = step_parts(source)
    rules = rules_of(settings, str(source), step_schema(source))
    columns = sorted({"text" if rule.name == SIZE else rule.name for rule in rules} | {"source"})
    flow, documents = Flow(), 0
    dropped = np.zeros(len(rules), np.int64)
    for path in parts:
        for batch in read_part(path, columns):
            verdicts = _judge(batch, rules, flow)
            documents += batch.num_rows
            dropped += np.bincount(verdicts[verdicts != KEPT], minlength=len(rules))
    by_rule = {rule.name: int(number) for rule, number in zip(rules, dropped, strict=True)}
    counts = _rule_counts(rules, flow.counters, by_rule)
    return Preview(documents, documents - int(dropped.sum()), counts)


def rules_of(settings: FilterSettings, source: str, schema: pa.Schema | None) -> list[Rule]:
    """The rules in force, in the order they are tried; checked against the columns that `source` has.

    Raises:  DataError if a rule is not one, or has no column
    """
    rules = []
    if settings.min_bytes is not None or settings.max_bytes is not None:
        rules.append(Rule(SIZE, settings.min_bytes or 0, settings.max_bytes or _UNBOUNDED))
    if settings.languages:
        rules.append(Rule("language", languages=settings.languages))
    known = [name for rule_set in RULE_SETS.values() for name in rule_set]
    for name in settings.without:
        if name not in known:
            raise DataError(f"filter.without: there is no rule {name!r}; {nearest(name, known)}")
    bounds: dict[str, Bounds] = {}
    for set_name, rule_set in RULE_SETS.items():
        if getattr(settings, set_name):
            bounds |= {name: limits for name, limits in rule_set.items() if name not in settings.without}
    bounds |= {name: settings.thresholds[name] for name in sorted(settings.thresholds)}
    rules += [Rule(name, *limits) for name, limits in bounds.items()]
    if schema is not None:
        _check(rules, settings, source, schema)
    return rules


def _check(rules: Sequence[Rule], settings: FilterSettings, source: str, schema: pa.Schema) -> None:
    numbers = [field.name for field in schema if is_number(field.type)]
    for rule in rules:
        if rule.name in numbers or (rule.name == SIZE and rule.name not in settings.thresholds):
            continue
        if rule.languages:
            if "language" not in schema.names:
                raise DataError(f"filter.languages: {source} has no column language")
            continue
        if rule.name in settings.thresholds:
            check_number(schema, rule.name, "filter.thresholds", source)
        set_name = next(name for name, rule_set in RULE_SETS.items() if rule.name in rule_set)
        raise DataError(
            f"filter.{set_name} needs the column {rule.name}, which {source} has not; set "
            f"filter.{set_name}=false, or run clean with these statistics"
        )


def stays(settings: FilterSettings, column: str) -> bool:
    """Whether documents that stay keep this column."""
    return settings.keep_statistics or not column.startswith(STATISTICS)


def _filter_part(
    rules: Sequence[Rule], settings: FilterSettings, path: Path, flow: Flow
) -> Iterator[pa.RecordBatch]:
    names = [rule.name for rule in rules]
    for batch in read_part(path):
        verdicts = _judge(batch, rules, flow)
        flow.pass_batch(batch, verdicts, names, why=_Reasons(batch, verdicts, rules))
        _tally(batch, names, flow)
        kept = batch.filter(pa.array(verdicts == KEPT))
        yield kept.select([name for name in kept.schema.names if stays(settings, name)])


def _judge(batch: pa.RecordBatch, rules: Sequence[Rule], flow: Flow) -> NDArray[np.int64]:
    """The first rule each document fails, or KEPT; int64 [rows]. Counts the failures of each."""
    fails = np.zeros((len(rules), batch.num_rows), bool)
    for number, rule in enumerate(rules):
        fails[number], unmeasured = _failures(batch, rule)
        flow.count(f"unmeasured: {rule.name}", unmeasured)
    alone = fails.sum(0) == 1
    for number, rule in enumerate(rules):
        flow.count(f"failed: {rule.name}", fails[number].sum())
        flow.count(f"failed alone: {rule.name}", (fails[number] & alone).sum())
    first = fails.argmax(0) if rules else np.zeros(batch.num_rows, np.int64)
    return np.where(fails.any(0), first, KEPT)


def _tally(batch: pa.RecordBatch, names: Sequence[str], flow: Flow) -> None:
    """Add the values of the rules' columns and all statistics to the flow's histograms."""
    for name in batch.schema.names:
        column = batch.column(name)
        if (name in names or name.startswith(STATISTICS)) and is_number(column.type):
            values, is_null = _numbers(column)
            flow.tally_counts(name, binned(values[~is_null]).items())


def _failures(batch: pa.RecordBatch, rule: Rule) -> tuple[NDArray[np.bool_], int]:
    """Which documents fail a rule, bool [rows], and how many have no value, and so do not."""
    if rule.name == SIZE:
        sizes = texts(batch.column("text")).sizes
        return (sizes < rule.low) | (sizes > rule.high), 0
    column = batch.column(rule.name)
    if rule.languages:
        languages = column.to_pylist()
        return np.array([language not in rule.languages for language in languages], bool), 0
    values, is_null = _numbers(column)
    # 0.1 in 32 bits is more than 0.1: bounds are rounded as the values were.
    low, high = (values.dtype.type(bound) for bound in (rule.low, rule.high))
    return ~is_null & ~((values >= low) & (values <= high)), int(is_null.sum())


def _numbers(column: pa.Array) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """A column's values (float64 if whole, else as they are) and which are null; both [rows]."""
    is_null = np.asarray(column.is_null())
    values = column.fill_null(0).to_numpy(zero_copy_only=False)
    return (values if values.dtype.kind == "f" else values.astype(np.float64)), is_null


class _Reasons(Sequence[str]):
    """Why each row was dropped, worded only for those that are shown."""

    def __init__(self, batch: pa.RecordBatch, verdicts: NDArray[np.int64], rules: Sequence[Rule]) -> None:
        self._batch, self._verdicts, self._rules = batch, verdicts, rules

    def __getitem__(self, row: Any) -> Any:
        rule = self._rules[self._verdicts[row]]
        if rule.name == SIZE:
            value: Any = int(texts(self._batch.column("text")).sizes[row])
        else:
            value = self._batch.column(rule.name)[row].as_py()
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        return f"{shown}, not {_wanted(rule)}"

    def __len__(self) -> int:
        return len(self._verdicts)


def _wanted(rule: Rule) -> str:
    if rule.languages:
        return ", ".join(rule.languages)
    if rule.high == _UNBOUNDED:
        return f"{rule.low:g} or more"
    return f"{rule.high:g} or less" if rule.low in (0, -_UNBOUNDED) else f"{rule.low:g} to {rule.high:g}"


def _rule_counts(rules: Sequence[Rule], counters: dict[str, int], dropped: dict[str, int]) -> list[RuleCount]:
    return [
        RuleCount(
            rule,
            failed=counters.get(f"failed: {rule.name}", 0),
            alone=counters.get(f"failed alone: {rule.name}", 0),
            dropped=dropped.get(rule.name, 0),
            unmeasured=counters.get(f"unmeasured: {rule.name}", 0),
        )
        for rule in rules
    ]


def _told(count: RuleCount) -> dict[str, Any]:
    """As JSON, where there is no infinity."""
    rule = count.rule
    limits = {"low": rule.low, "high": rule.high}
    told = {name: limit if math.isfinite(limit) else None for name, limit in limits.items()}
    numbers = {name: getattr(count, name) for name in ("failed", "alone", "dropped", "unmeasured")}
    return {"name": rule.name, **told, "languages": list(rule.languages), **numbers}
