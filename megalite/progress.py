"""One progress display, of bytes or tasks: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

QUIET_S = 2.0  # shorter work needs no display
LINE_EVERY_S = 5.0

Update = Callable[[int, int], None]


@contextmanager
def progress(title: str, *, of_bytes: bool = True) -> Iterator[Update]:
    """Yield `update(done, total)`, both in bytes or tasks; total 0 when it is not known. Shows on stderr."""
    if sys.stderr.isatty():
        with _bar(title, of_bytes) as update:
            yield update
    else:
        yield _lines(title, of_bytes)


@contextmanager
def _bar(title: str, of_bytes: bool) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    done = DownloadColumn() if of_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), done, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(title, total=None)
        yield lambda done, total: display.update(task, completed=done, total=total or None)


def _lines(title: str, of_bytes: bool) -> Update:
    due = time.monotonic() + QUIET_S

    def update(done: int, total: int) -> None:
        nonlocal due
        if time.monotonic() >= due:
            told = [f"{number / 2**20:.1f}" if of_bytes else f"{number}" for number in (done, total)]
            of = f" of {told[1]}" if total else ""
            print(f"{title}: {told[0]}{of} {'MiB' if of_bytes else 'tasks'}", file=sys.stderr, flush=True)
            due = time.monotonic() + LINE_EVERY_S

    return update
