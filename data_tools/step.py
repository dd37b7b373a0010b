"""A step's folder: how it was made, the parts it made, and what happened to every document.

step.json     the step, its settings, and the fingerprints of itself and of what it read
parts/        part-00000.parquet …: the documents that went through, if it hands any on
done/PHASE/   a marker of each finished task, for a killed step to go on
report.json   the flow of documents; there when the step is finished, and the same however it was run
timing.json   how long it took; the only file that differs from run to run
"""

from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_tools.crew import Crew, Task, read_marker, write_json
from data_tools.documents import PartWriter
from data_tools.flow import Flow
from megalite.config.section import Section
from megalite.config_file import changed_keys
from megalite.data.folder import disk_errors
from megalite.errors import DataError

STEP_FILE = "step.json"
REPORT_FILE = "report.json"
TIMING_FILE = "timing.json"
PARTS = "parts"

# What a step does to one part: reads its batches, yields what goes on, counts into the flow.
Transform = Callable[[Path, Flow], Iterator[pa.RecordBatch]]


class Step:
    """One step at work in its folder. Every rank opens the same; `is_finished` says there is nothing to do.

    `inputs` are what it reads: finished steps' folders, or fingerprints of other things. A folder that was
    made otherwise (other settings, inputs or version) is refused, or with `renew` emptied and made again.

    Raises:  DataError naming the folder and what differs; or if an input is not a finished step
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        version: int,
        settings: Section,
        inputs: Sequence[Path | str],
        crew: Crew,
        *,
        renew: bool = False,
    ) -> None:
        self.folder, self.kind, self.crew = folder, kind, crew
        self._began = time.monotonic(), _cpu_s()
        self._head = {
            "step": kind,
            "version": version,
            "settings": settings.model_dump(mode="json"),
            "inputs": [fingerprint_of(item) if isinstance(item, Path) else item for item in inputs],
        }
        self.fingerprint = _digest(self._head)
        self._claim(renew)

    @property
    def is_finished(self) -> bool:
        """Whether its report is written."""
        return (self.folder / REPORT_FILE).exists()

    @property
    def parts_folder(self) -> Path:
        """Where its parts belong."""
        return self.folder / PARTS

    def run(self, phase: str, tasks: Sequence[Task]) -> list[dict[str, Any]]:
        """Do the tasks of a phase on all ranks; their results in task order."""
        return self.crew.run(
            self.folder / "done" / phase, tasks, f"{self.kind} {phase}".removesuffix(" parts")
        )

    def once(self, phase: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do something on rank 0 alone; its result, on every rank."""
        return self.run(phase, [Task("once", make)])[0]

    def map_parts(self, sources: Sequence[Path], transform: Transform, phase: str = "parts") -> list[Flow]:
        """Turn every source part into one part of the same name: batches from `transform(path, flow)`.

        `transform` is a module's function, or a partial of one. It yields at least one batch, without rows
        if nothing is left: `read_part` does so too.
        """
        tasks = [
            Task(
                path.stem,
                partial(_map_part, transform, path, self.parts_folder / path.name),
                path.stat().st_size,
            )
            for path in sources
        ]
        return [Flow.from_json(result) for result in self.run(phase, tasks)]

    def finish(self, flows: Sequence[Flow], **more: Any) -> Flow:
        """Write the report: the flows merged, and whatever else is worth telling, as JSON values."""
        total = Flow()
        for flow in flows:
            total.merge(flow)
        total.check(self.kind)
        if self.crew.is_first and not self.is_finished:
            wall, cpu = self._began
            timing = {
                "wall_s": round(time.monotonic() - wall, 3),
                "cpu_s": round(_cpu_s() - cpu, 3),
                "peak_worker_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10,
                "workers": self.crew.workers,
                "ranks": self.crew.place.world,
            }
            write_json(self.folder / TIMING_FILE, timing)
            report = {"step": self.kind, **total.to_json(), **more}
            write_json(self.folder / REPORT_FILE, report)
        self.crew.wait_for(lambda: self.is_finished, f"finish {self.folder}")
        return total

    def _claim(self, renew: bool) -> None:
        """Make the folder this step's: rank 0 does, the others wait to see it."""
        path = self.folder / STEP_FILE

        def is_claimed() -> bool:
            return (read_marker(self.folder, path.stem) or {}).get("fingerprint") == self.fingerprint

        if not self.crew.is_first:
            self.crew.wait_for(is_claimed, f"open {self.folder}")
        if is_claimed():
            return
        found = read_marker(self.folder, path.stem)
        inside = {item.name for item in self.folder.iterdir()} if self.folder.exists() else set()
        # A step that was killed while it claimed the folder left no more than its unfinished file.
        inside = {name for name in inside if not re.fullmatch(rf"ranks|{STEP_FILE}\.\d+\.tmp", name)}
        if found is None and inside:
            raise DataError(
                f"{self.folder} is in the way and no step made it; name another folder or remove it"
            )
        if found is not None and not renew:
            changes = changed_keys(found, {**self._head, "fingerprint": self.fingerprint})
            changes.pop("fingerprint", None)
            key, (old, new) = next(iter(changes.items()))
            raise DataError(
                f"{self.folder} was made with {key}={old!r}, not {new!r}; name another folder or remove it"
            )
        with disk_errors(self.folder):
            if found is not None:
                _remove(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {**self._head, "fingerprint": self.fingerprint})


def step_parts(folder: Path) -> list[Path]:
    """The parts of a finished step, in order.

    Raises:  DataError if the folder is not one, or the step is not finished
    """
    fingerprint_of(folder)
    return sorted((folder / PARTS).glob("part-*.parquet"))


def read_report(folder: Path) -> dict[str, Any]:
    """A finished step's report.

    Raises:  DataError if it is not finished or the report is damaged
    """
    report = read_marker(folder, Path(REPORT_FILE).stem)
    if report is None:
        raise DataError(f"{folder} is not a finished step (no {REPORT_FILE}); run the command that makes it")
    return report


def fingerprint_of(folder: Path) -> str:
    """What identifies a finished step's output.

    Raises:  DataError if the folder is not a finished step
    """
    read_report(folder)
    head = read_marker(folder, Path(STEP_FILE).stem)
    if head is None or not isinstance(head.get("fingerprint"), str):
        raise DataError(f"{folder} has no {STEP_FILE}; run the command that makes it")
    return str(head["fingerprint"])


def _map_part(transform: Transform, source: Path, target: Path) -> dict[str, Any]:
    flow = Flow()
    batches = transform(source, flow)
    first = next(batches)
    with PartWriter(target, first.schema) as writer:
        for batch in chain([first], batches):
            writer.write(batch)
    return flow.to_json()


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _remove(folder: Path) -> None:
    """Empty a step's folder, `step.json` last, so that a killed removal is taken up again."""
    for name in (REPORT_FILE, "done", PARTS):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name != STEP_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _cpu_s() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(item.ru_utime + item.ru_stime for item in usage)
