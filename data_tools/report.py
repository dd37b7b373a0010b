"""One page that shows where every document went: in = out + dropped, for each step, source and reason.

The page is a single HTML file without scripts or anything from elsewhere. Texts in it are a stranger's and
are shown as such: escaped, cut short, control characters by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from data_tools.crew import read_marker
from data_tools.flow import Flow
from data_tools.show import printable
from data_tools.step import TIMING_FILE, read_report
from megalite.data.staging import write_text

SHOWN_BINS = 40
BAR_WIDTH = 260
_TOLD_KEYS = {"step", "parts", "sources", "examples", "histograms", "counters"}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto }
h1 { font-size: 1.6rem }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem }
h3 { font-size: 1rem; margin-bottom: .3rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem .9rem .15rem 0; text-align: right; vertical-align: top }
td:first-child, th:first-child { text-align: left }
th { font-weight: 600; border-bottom: 1px solid #ccc }
tr.total td { border-top: 1px solid #ccc; font-weight: 600 }
.bar { display: inline-block; height: .7em; background: #4477aa }
.bar.out { background: #bb5544 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: .5rem .8rem }
summary { cursor: pointer }
.why { color: #a04030 }
.dim { color: #777 }
@media (prefers-color-scheme: dark) {
  body { background: #191919; color: #ddd }
  pre { background: #252525 }
  td, th, h2 { border-color: #444 !important }
}
"""


def write_report(steps: Sequence[tuple[str, Path]], path: Path, title: str) -> None:
    """Write the page of these finished steps, (name, folder), in the order they ran.

    Raises:  DataError if one is not finished, or the disk refuses
    """
    reports = [
        (name, read_report(folder), read_marker(folder, Path(TIMING_FILE).stem)) for name, folder in steps
    ]
    body = [f"<h1>{escape(title)}</h1>", _overview(reports)]
    body += [_step(name, report) for name, report, _ in reports]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"
    )
    write_text(path, page)


def summary(name: str, flow: Flow) -> str:
    """What a step did, in one line for a terminal."""
    if not flow.sources:  # a plan, not a passage of documents
        return f"{name}: {', '.join(f'{number:,} {what}' for what, number in sorted(flow.counters.items()))}"
    documents_in, documents_out, bytes_in, bytes_out = flow.totals()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in _largest(flow.dropped()))
    left_out = f"; left out: {reasons}" if reasons else ""
    return (
        f"{name}: {documents_in:,} → {documents_out:,} documents, "
        f"{bytes_in / 1e6:,.1f} → {bytes_out / 1e6:,.1f} MB{left_out}"
    )


def _overview(reports: Sequence[tuple[str, dict[str, Any], dict[str, Any] | None]]) -> str:
    rows = []
    for name, report, timing in reports:
        documents_in, documents_out, bytes_in, bytes_out = _flow(report).totals()
        kept = bytes_out / bytes_in if bytes_in else 1.0
        speed = "" if not timing or not timing["wall_s"] else f"{bytes_in / 1e6 / timing['wall_s']:,.1f}"
        wall = f"{timing['wall_s']:,.1f}" if timing else ""
        link = f'<a href="#{escape(name)}">{escape(name)}</a>'
        cells = (f"{documents_in:,}", f"{documents_out:,}", _mb(bytes_in), _mb(bytes_out), wall, speed)
        rows.append([link, *cells, _bar(kept)])
    head = ("step", "documents in", "out", "MB in", "out", "seconds", "MB/s", "bytes kept")
    return _table(head, rows)


def _step(name: str, report: dict[str, Any]) -> str:
    flow = _flow(report)
    parts = [f'<h2 id="{escape(name)}">{escape(name)}</h2>', _sources(flow), _reasons(flow)]
    if flow.counters:
        rows = [[escape(printable(key)), f"{number:,}"] for key, number in sorted(flow.counters.items())]
        parts.append(f"<h3>Changes</h3>{_table(('what', 'count'), rows)}")
    parts += [_histogram(title, bins) for title, bins in flow.histograms.items()]
    more = {key: value for key, value in report.items() if key not in _TOLD_KEYS}
    if more:
        text = json.dumps(more, indent=2, ensure_ascii=False)
        parts.append(f"<details><summary>More of this step</summary><pre>{_text(text)}</pre></details>")
    return "".join(parts)


def _sources(flow: Flow) -> str:
    rows = [
        [
            escape(printable(source)),
            f"{counts['in_documents']:,}",
            f"{counts['out_documents']:,}",
            f"{counts['in_documents'] - counts['out_documents']:,}",
            _mb(counts["in_bytes"]),
            _mb(counts["out_bytes"]),
        ]
        for source, counts in sorted(flow.sources.items())
    ]
    documents_in, documents_out, bytes_in, bytes_out = flow.totals()
    total = ["all", f"{documents_in:,}", f"{documents_out:,}", f"{documents_in - documents_out:,}"]
    head = ("source", "documents in", "out", "left out", "MB in", "out")
    return _table(head, rows, [*total, _mb(bytes_in), _mb(bytes_out)])


def _reasons(flow: Flow) -> str:
    dropped = flow.dropped()
    if not dropped:
        return ""
    documents_in = flow.totals()[0]
    parts = ["<h3>Left out</h3>"]
    for reason, count in _largest(dropped, len(dropped)):
        share = count / documents_in
        by_source = ", ".join(
            f"{escape(printable(source))} {counts['dropped'][reason]['documents']:,}"
            for source, counts in sorted(flow.sources.items())
            if reason in counts["dropped"]
        )
        head = f"{escape(printable(reason))}: {count:,} ({share:.2%})"
        parts.append(
            f"<details><summary>{_bar(share, 'out')} {head} "
            f'<span class="dim">{by_source}</span></summary>'
            f"{_examples(flow.examples.get(reason, []))}</details>"
        )
    return "".join(parts)


def _examples(examples: Iterable[dict[str, Any]]) -> str:
    return "".join(
        f"<p>{escape(printable(example['source']))} · {escape(printable(example['id']))}"
        f' <span class="why">{escape(printable(example["why"]))}</span></p>'
        f"<pre>{_text(example['text'])}</pre>"
        for example in examples
    )


def _histogram(title: str, bins: dict[str, int]) -> str:
    numeric = all(label.lstrip("-")[:1].isdigit() for label in bins)  # also 1e+06
    items = sorted(bins.items(), key=lambda item: float(item[0]) if numeric else (-item[1], item[0]))
    most = max(bins.values(), default=1)
    rows = [
        [escape(printable(label)), f"{number:,}", _bar(number / most)] for label, number in items[:SHOWN_BINS]
    ]
    rest = sum(number for _, number in items[SHOWN_BINS:])
    if rest:
        rows.append([f"{len(items) - SHOWN_BINS} more", f"{rest:,}", ""])
    return f"<h3>{escape(printable(title))}</h3>{_table((title, 'documents', ''), rows)}"


def _flow(report: dict[str, Any]) -> Flow:
    return Flow.from_json(report)


def _largest(counts: dict[str, int], most: int = 4) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] | None = None) -> str:
    """A table of cells that are HTML already."""
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    if total is not None:
        lines.append(f'<tr class="total">{"".join(f"<td>{cell}</td>" for cell in total)}</tr>')
    return f"<table>{''.join(lines)}</table>"


def _bar(share: float, kind: str = "") -> str:
    return f'<span class="bar {kind}" style="width:{BAR_WIDTH * min(max(share, 0.0), 1.0):.1f}px"></span>'


def _text(text: str) -> str:
    """A stranger's text, its lines kept."""
    return "\n".join(escape(printable(line)) for line in text.split("\n"))


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"
