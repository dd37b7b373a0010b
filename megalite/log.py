"""What a run says: metrics.jsonl, ledger.jsonl, and the console."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from megalite.errors import ConfigError

METRICS, LEDGER = "metrics.jsonl", "ledger.jsonl"  # in a run folder


class JsonLines:
    """An append-only file of JSON objects, one a line, each on disk as soon as it is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] = path.open("a", encoding="utf-8")
        with path.open("rb") as written:
            if written.seek(0, os.SEEK_END) and os.pread(written.fileno(), 1, written.tell() - 1) != b"\n":
                self._file.write("\n")  # a kill tore the last line, which must not take the next with it

    def append(self, record: dict[str, Any], is_durable: bool = False) -> None:
        """Write one object; numbers JSON cannot express become null. If durable, a power cut spares it."""
        finite = {k: _finite(v) for k, v in record.items()}
        self._file.write(json.dumps(finite, ensure_ascii=False) + "\n")
        self._file.flush()
        if is_durable:
            os.fsync(self._file.fileno())

    def drop_after(self, step: int) -> None:
        """Cut off what a run wrote past the checkpoint it now continues from, and a torn last line."""
        with suppress(OSError):  # of lines it could not write when it was asked to
            self._file.close()
        self._file = self.path.open("a", encoding="utf-8")
        kept = takewhile(lambda found: found[0].get("step", 0) <= step, _records(self.path))
        # In place, which a full disk allows: what stayed would soon be there twice.
        os.truncate(self.path, max((end for _, end in kept), default=0))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a line torn by a kill is left out."""
    return [record for record, _ in _records(path)] if path.exists() else []


def _records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """One after another, for a long run's do not fit in memory; and the byte at which each ends."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record, end


class RunLog:
    """Everything one process reports; only the first process of a run has one that speaks.

    A disk that refuses costs lines, not the run: it is told once, and once more after it took some again.
    """

    def __init__(self, run_dir: Path, speaks: bool, steps: int, every_steps: int) -> None:
        """Raises:  ConfigError if a file cannot be opened"""
        self._speaks, self._steps, self._every = speaks, steps, every_steps
        self._metrics: JsonLines | None = None
        self._ledger: JsonLines | None = None
        self._refusing: set[Path] = set()  # files that took no line when last asked to
        if speaks:
            self._metrics, self._ledger = _open(run_dir / METRICS), _open(run_dir / LEDGER)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._validation = ""

    def __enter__(self) -> Self:
        if self._speaks and sys.stderr.isatty():
            # On a narrow terminal what stands last is cut.
            steps, time_left = (Column(min_width=n, no_wrap=True) for n in (6 + 2 * len(f"{self._steps}"), 7))
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}", table_column=steps),
                BarColumn(bar_width=None),
                TimeRemainingColumn(table_column=time_left),
                TextColumn("left"),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task("starting", total=self._steps)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        for file in (self._metrics, self._ledger):
            if file is not None:
                with suppress(OSError):  # of lines that were told to be missing
                    file.close()

    def resume(self, step: int) -> None:
        """Continue at `step`: forget metrics of later steps; the ledger keeps everything."""
        if self._metrics is not None:
            with self._alerts(self._metrics.path):
                self._metrics.drop_after(step)
        if self._progress is not None and self._task is not None:
            self._progress.reset(self._task, completed=step)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self._speaks:
            print(text, file=sys.stderr, flush=True)

    def event(self, kind: str, step: int, **details: Any) -> None:
        """A line in the ledger: something a reader of the curves must know."""
        if self._ledger is not None:
            with self._alerts(self._ledger.path):
                self.commit(kind, step, **details)

    def commit(self, kind: str, step: int, **details: Any) -> None:
        """A line in the ledger on which the data of all later steps depend.

        Raises:  ConfigError if it did not reach the disk
        """
        if self._ledger is not None:
            record = {"event": kind, "step": step, "unix_s": round(time.time(), 3), **details}
            with _refusals(self._ledger.path):
                self._ledger.append(record, is_durable=True)

    def keep_curve(self, path: Path, after: int) -> None:
        """Copy the metrics of the steps after `after`, which are about to be forgotten, to `path`.

        A disk that refuses costs the curve, not the run.
        """
        if self._metrics is None:
            return
        records = [record for record, _ in _records(self._metrics.path) if record.get("step", 0) > after]
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        except OSError as error:
            self.say(f"alert: cannot write {path}: {error.strerror}")

    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step: into metrics.jsonl, and to the bar or as a line."""
        if self._metrics is None:
            return
        with self._alerts(self._metrics.path):
            self._metrics.append(record)
        if "val_loss" in record:
            self._validation = f"  val {record['val_loss']:.4f}"
        mfu = f"  mfu {record['mfu']:.1%}" if record.get("mfu") is not None else ""
        state = (
            f"loss {record['loss']:.4f}{self._validation}  norm {record['grad_norm']:.2f}  "
            f"{record['tokens_per_s']:,.0f} tokens/s{mfu}"
        )
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=record["step"], description=state)
        elif record["step"] % self._every == 0 or record["step"] == self._steps or "val_loss" in record:
            left = (self._steps - record["step"]) * record["step_s"]
            progress = f"step {record['step']}/{self._steps}  {state}  lr {record['lr']:.2e}"
            print(f"{progress}  {_duration(left)} left", file=sys.stderr, flush=True)

    @contextmanager
    def _alerts(self, path: Path) -> Iterator[None]:
        """Around a line that the run can do without."""
        try:
            with _refusals(path):
                yield
        except ConfigError as error:
            if path not in self._refusing:
                self.say(f"alert: {error}; training goes on")
            self._refusing.add(path)
        else:
            self._refusing.discard(path)


def _open(path: Path) -> JsonLines:
    with _refusals(path):
        return JsonLines(path)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Around a disk's work on a file.

    Raises:  ConfigError
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; free some space or move run_dir") from None


def _finite(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
