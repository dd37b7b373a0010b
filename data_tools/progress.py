"""One progress display: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

QUIET_S = 2.0  # shorter work needs no display
LINE_EVERY_S = 5.0

Update = Callable[[int, int], None]


@contextmanager
def progress(title: str) -> Iterator[Update]:
    """Yield `update(done, total)`, both in bytes; total 0 when it is not known. Shows on stderr."""
    if sys.stderr.isatty():
        with _bar(title) as update:
            yield update
    else:
        yield _lines(title)


@contextmanager
def _bar(title: str) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(title, total=None)
        yield lambda done, total: display.update(task, completed=done, total=total or None)


def _lines(title: str) -> Update:
    due = time.monotonic() + QUIET_S

    def update(done: int, total: int) -> None:
        nonlocal due
        if time.monotonic() >= due:
            of = f" of {total / 2**20:.1f}" if total else ""
            print(f"{title}: {done / 2**20:.1f}{of} MiB", file=sys.stderr, flush=True)
            due = time.monotonic() + LINE_EVERY_S

    return update
