"""Count a dataset: documents, tokens and lengths of every source, as text, JSON or a picture."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.show import printable
from megalite.data.folder import disk_errors
from megalite.data.shards import Dataset
from megalite.progress import progress

BINS = 32  # bin b counts documents of [2^b, 2^(b + 1)) tokens
SHOWN_SOURCES = 30


@dataclass
class SourceStats:
    """Counts of one source; `histogram` is int64 [BINS] over document lengths."""

    documents: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    shortest: int = 2**31
    longest: int = 0
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))

    def add(self, lengths: NDArray[np.int64], loss_tokens: int) -> None:
        """Count documents of these lengths, int64 [documents]."""
        self.documents += lengths.size
        self.tokens += int(lengths.sum())
        self.loss_tokens += loss_tokens
        self.shortest = min(self.shortest, int(lengths.min()))
        self.longest = max(self.longest, int(lengths.max()))
        self.histogram += np.bincount(np.frexp(lengths)[1] - 1, minlength=BINS)

    def as_json(self) -> dict[str, Any]:
        """The counts as JSON values; the histogram maps the least length of a bin to its documents."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "shortest": self.shortest,
            "mean": self.tokens / self.documents,
            "longest": self.longest,
            "histogram": {str(1 << b): int(n) for b, n in enumerate(self.histogram) if n},
        }


def count(dataset: Dataset, title: str = "counting") -> dict[str, SourceStats]:
    """Statistics by source, the one with the most tokens first. Reads every record batch.

    Raises:  CorruptBlockError
    """
    sources: dict[str, SourceStats] = {}
    width = dataset.manifest.dtype.itemsize
    with progress(title) as update:
        for number in range(dataset.num_blocks):
            block = dataset.block(number)
            lengths = np.diff(block.offsets).astype(np.int64)
            trained = lengths
            if block.loss_mask is not None:
                trained = np.add.reduceat(block.loss_mask, block.offsets[:-1], dtype=np.int64)
            codes, names = block.encoded_sources()
            for code, name in enumerate(names):
                mine = codes == code
                sources.setdefault(name, SourceStats()).add(lengths[mine], int(trained[mine].sum()))
            done = int(dataset.block_ends[number])
            update(done * width, dataset.total_tokens * width)
    return dict(sorted(sources.items(), key=lambda item: (-item[1].tokens, item[0])))


def run(path: str | Path, as_json: bool, svg: Path | None) -> int:
    """Count a dataset and print the result; also draw its lengths to the file `svg` if one is named."""
    dataset = Dataset(path)
    sources = count(dataset, f"counting {path}")
    empty = dataset.manifest.empty_documents
    if svg is not None:
        with disk_errors(svg):
            # A folder's name may be bytes that are not UTF-8.
            svg.write_text(histogram_svg(sources, str(path)), encoding="utf-8", errors="backslashreplace")
    if as_json:
        totals = {
            "documents": dataset.num_documents,
            "tokens": dataset.total_tokens,
            "empty_documents": empty,
        }
        table = {name: stats.as_json() for name, stats in sources.items()}
        print(json.dumps({"dataset": str(path), **totals, "sources": table}, indent=2))
        return 0
    _print_table(dataset, sources)
    left_out = f"; {empty:,} empty documents were left out" if empty else ""
    print(f"{dataset.num_documents:,} documents, {dataset.total_tokens:,} tokens{left_out}")
    return 0


def _print_table(dataset: Dataset, sources: dict[str, SourceStats]) -> None:
    console = Console(file=sys.stdout, highlight=False)
    table = Table("source", box=None, pad_edge=False)
    titles = ["documents", "tokens", "share", "shortest", "mean", "longest"]
    has_mask = dataset.manifest.has_loss_mask
    for title in [*titles, "for the loss"] if has_mask else titles:
        table.add_column(title, justify="right")
    for name, s in list(sources.items())[:SHOWN_SOURCES]:
        share, mean = s.tokens / dataset.total_tokens, s.tokens / s.documents
        values = [
            f"{s.documents:,}",
            f"{s.tokens:,}",
            f"{share:.1%}",
            f"{s.shortest:,}",
            f"{mean:,.0f}",
            f"{s.longest:,}",
        ]
        if has_mask:
            values.append(f"{s.loss_tokens / s.tokens:.1%}")
        table.add_row(Text(printable(name)), *values)
    console.print(table)
    if len(sources) > SHOWN_SOURCES:
        print(f"… and {len(sources) - SHOWN_SOURCES:,} smaller sources; --json has them all")
    print("\ndocuments by length in tokens")
    total = _total(sources)
    width = max(10, min(60, console.width - 40))
    for b in _used_bins(total):
        bar = "█" * round(width * int(total[b]) / int(total.max()))
        print(f"{_bin_name(b):>21}  {int(total[b]):>13,}  {bar or '▏'}")
    print()


def histogram_svg(sources: dict[str, SourceStats], title: str) -> str:
    """An SVG bar chart of document lengths, all sources together."""
    total = _total(sources)
    bins = _used_bins(total)
    row, left, width = 22, 190, 420
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 130}" '
        f'height="{row * len(bins) + 50}" font-family="sans-serif" font-size="13">',
        f'<text x="10" y="22" font-weight="bold">{escape(printable(title))}: '
        "documents by length in tokens</text>",
    ]
    for place, b in enumerate(bins):
        y, size = 40 + row * place, width * int(total[b]) / int(total.max())
        parts += [
            f'<text x="{left - 10}" y="{y + 14}" text-anchor="end">{_bin_name(b)}</text>',
            f'<rect x="{left}" y="{y}" width="{size:.1f}" height="{row - 5}" fill="#4477aa"/>',
            f'<text x="{left + size + 6:.1f}" y="{y + 14}">{int(total[b]):,}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def _total(sources: dict[str, SourceStats]) -> NDArray[np.int64]:
    total: NDArray[np.int64] = np.sum([stats.histogram for stats in sources.values()], axis=0)
    return total


def _used_bins(total: NDArray[np.int64]) -> range:
    used = total.nonzero()[0].tolist()
    return range(used[0], used[-1] + 1)


def _bin_name(b: int) -> str:
    return f"{1 << b:,} … {(2 << b) - 1:,}" if b else "1"
