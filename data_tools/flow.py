"""What happened to every document of a step: in = out + dropped, by source and reason, with examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_tools.documents import rows_by_source, texts
from megalite.errors import DataError

EXAMPLES = 3  # of each reason and source
EXAMPLE_CHARS = 300
KEPT = -1  # a verdict


class Flow:
    """Counts of one task or, merged in task order, of a step. Plain JSON in and out.

    Documents and bytes of UTF-8 text are counted by source. `drop` and `keep` are for one document,
    `pass_batch` for many; every document that entered is either.
    """

    def __init__(self) -> None:
        self.sources: dict[str, dict[str, Any]] = {}
        self.examples: dict[str, list[dict[str, Any]]] = {}
        self.histograms: dict[str, dict[str, int]] = {}
        self.counters: dict[str, int] = {}

    def keep(self, source: str, bytes_in: int, bytes_out: int | None = None, *, documents: int = 1) -> None:
        """One document or some went through, perhaps changed in size."""
        self._count(source, "in", bytes_in, documents)
        self._count(source, "out", bytes_in if bytes_out is None else bytes_out, documents)

    def drop(self, source: str, reason: str, bytes_in: int, doc_id: str, text: str, why: str = "") -> None:
        """One document was left out, for a reason with an optional detail such as the value measured."""
        self._count(source, "in", bytes_in)
        self._count_dropped(source, reason, 1, bytes_in)
        self.example(source, reason, doc_id, text, why)

    def example(self, source: str, label: str, doc_id: str, text: str, why: str = "") -> None:
        """Show a document dropped, or what was changed of one, under a reason or a label of its own."""
        examples = self.examples.setdefault(label, [])
        if sum(example["source"] == source for example in examples) < EXAMPLES:
            examples.append({"source": source, "id": doc_id, "text": text[:EXAMPLE_CHARS], "why": why})

    def pass_batch(
        self,
        batch: pa.RecordBatch,
        verdicts: NDArray[np.integer[Any]],
        reasons: Sequence[str],
        out: pa.RecordBatch | None = None,
        why: Sequence[str] | None = None,
    ) -> None:
        """A batch went through a step: verdicts [rows], KEPT or an index into `reasons`.

        `out` holds the kept rows as they left, for their sizes, where the step changes text. `why[row]` is
        the detail for a dropped row's example.
        """
        sizes = texts(batch.column("text")).sizes
        kept_sizes = sizes.copy()
        if out is not None:
            kept_sizes[verdicts == KEPT] = texts(out.column("text")).sizes
        for source, here in rows_by_source(batch):
            self._count(source, "in", int(sizes[here].sum()), int(here.sum()))
            kept = here & (verdicts == KEPT)
            self._count(source, "out", int(kept_sizes[kept].sum()), int(kept.sum()))
            for index in np.unique(verdicts[here & (verdicts != KEPT)]).tolist():
                dropped = here & (verdicts == index)
                self._count_dropped(source, reasons[index], int(dropped.sum()), int(sizes[dropped].sum()))
                for row in np.flatnonzero(dropped)[:EXAMPLES].tolist():
                    detail = "" if why is None else why[row]
                    text = batch.column("text")[row].as_py()
                    self.example(source, reasons[index], batch.column("id")[row].as_py(), text, detail)

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter that is not about whole documents, such as lines removed."""
        self.counters[name] = self.counters.get(name, 0) + int(number)

    def tally(self, histogram: str, labels: Iterable[str]) -> None:
        """Count labels in a histogram."""
        self.tally_counts(histogram, ((label, 1) for label in labels))

    def tally_counts(self, histogram: str, counts: Iterable[tuple[str, int]]) -> None:
        """Add counts of labels, which may come more than once, to a histogram."""
        bins = self.histograms.setdefault(histogram, {})
        for label, number in counts:
            bins[label] = bins.get(label, 0) + number

    def tally_lengths(self, batch: pa.RecordBatch) -> None:
        """Count documents by the power of two their bytes lie above."""
        powers = np.floor(np.log2(np.maximum(texts(batch.column("text")).sizes, 1))).astype(int)
        numbers = enumerate(np.bincount(powers).tolist())
        self.tally_counts("length", ((str(2**power), number) for power, number in numbers if number))

    def merge(self, other: Flow) -> None:
        """Add what a later task counted."""
        for source, counts in other.sources.items():
            for way in ("in", "out"):
                self._count(source, way, counts[f"{way}_bytes"], counts[f"{way}_documents"])
            for reason, dropped in counts["dropped"].items():
                self._count_dropped(source, reason, dropped["documents"], dropped["bytes"])
        for reason, examples in other.examples.items():
            for example in examples:
                self.example(example["source"], reason, example["id"], example["text"], example["why"])
        for histogram, bins in other.histograms.items():
            self.tally_counts(histogram, bins.items())
        for name, number in other.counters.items():
            self.count(name, number)

    def check(self, step: str) -> None:
        """Raises:  DataError if a document is unaccounted for, which is a bug of ours"""
        for source, counts in self.sources.items():
            dropped = sum(reason["documents"] for reason in counts["dropped"].values())
            if counts["in_documents"] != counts["out_documents"] + dropped:
                raise DataError(
                    f"{step}: {counts['in_documents']} documents of {source} came in, but "
                    f"{counts['out_documents']} went out and {dropped} were dropped; please report this"
                )

    def to_json(self) -> dict[str, Any]:
        """Plain values; equal flows give equal ones, keys in sorted order."""
        return {
            "sources": {
                source: {**counts, "dropped": dict(sorted(counts["dropped"].items()))}
                for source, counts in sorted(self.sources.items())
            },
            "examples": dict(sorted(self.examples.items())),
            "histograms": {
                name: dict(sorted(bins.items())) for name, bins in sorted(self.histograms.items())
            },
            "counters": dict(sorted(self.counters.items())),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Flow:
        """What `to_json` gave."""
        flow = cls()
        flow.sources = values["sources"]
        flow.examples = values["examples"]
        flow.histograms = values["histograms"]
        flow.counters = values["counters"]
        return flow

    def totals(self) -> tuple[int, int, int, int]:
        """Documents in and out, bytes in and out, of all sources."""
        keys = ("in_documents", "out_documents", "in_bytes", "out_bytes")
        a, b, c, d = (sum(counts[key] for counts in self.sources.values()) for key in keys)
        return a, b, c, d

    def dropped(self) -> dict[str, int]:
        """Documents dropped by reason, of all sources."""
        total: dict[str, int] = {}
        for counts in self.sources.values():
            for reason, dropped in counts["dropped"].items():
                total[reason] = total.get(reason, 0) + dropped["documents"]
        return dict(sorted(total.items()))

    def _source(self, source: str) -> dict[str, Any]:
        empty = {"in_documents": 0, "in_bytes": 0, "out_documents": 0, "out_bytes": 0, "dropped": {}}
        return self.sources.setdefault(source, empty)

    def _count(self, source: str, way: str, size: int, documents: int = 1) -> None:
        counts = self._source(source)
        counts[f"{way}_documents"] += documents
        counts[f"{way}_bytes"] += size

    def _count_dropped(self, source: str, reason: str, documents: int, size: int) -> None:
        dropped = self._source(source)["dropped"].setdefault(reason, {"documents": 0, "bytes": 0})
        dropped["documents"] += documents
        dropped["bytes"] += size
