"""A step's folder: how it was made, the parts it made, and what happened to every document.

step.json     the step, its settings, and the fingerprints of itself and of what it read
parts/        part-000000.parquet …: the documents that went through, if it hands any on
done/PHASE/   a marker of each finished task, for a killed step to go on
report.json   the flow of documents; there when the step is finished, and the same however it was run
timing.json   how long it took; the only file that differs from run to run
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_tools.crew import Crew, Task, peak_bytes, read_marker, write_json
from data_tools.documents import PartWriter, read_schema
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

    Raises:  DataError naming the folder and what differs; or if an input is not a finished step, or its parts
    are gone
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
        self._sources = [item for item in inputs if isinstance(item, Path)]
        self._began = time.monotonic(), time.process_time() + crew.used.cpu_s
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

    def run(self, phase: str, tasks: Sequence[Task]) -> list[dict[str, Any]]:
        """Do the tasks of a phase on all ranks; their results in task order."""
        return self.crew.run(
            self.folder / "done" / phase, tasks, f"{self.kind} {phase}".removesuffix(" parts")
        )

    def once(self, phase: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do something on rank 0 alone; its result, on every rank."""
        return self.run(phase, [Task("once", make)])[0]

    def map_parts(self, sources: Sequence[Path], transform: Transform) -> list[Flow]:
        """Turn every source part into one part of the same name: batches from `transform(path, flow)`.

        `transform` is a module's function, or a partial of one. It yields at least one batch, without rows
        if nothing is left: `read_part` does so too.

        Raises:  DataError of a task that fails, or naming a part that was removed since its task was done
        """
        tasks = part_tasks(sources, partial(_map_part, transform, self.folder / PARTS))
        flows = [Flow.from_json(result) for result in self.run(PARTS, tasks)]
        for source in sources:
            if not (part := self.folder / PARTS / source.name).exists():
                raise DataError(f"{part} is gone, though it was made; remove {self.folder}, and run again")
        return flows

    def finish(self, flows: Sequence[Flow], *, anew: bool = False, **more: Any) -> Flow:
        """Write the report: the flows merged, and whatever else is worth telling, as JSON values.

        It is left as it is if it is there, unless `anew`, for a step that can be taken further.
        """
        total = Flow()
        for flow in flows:
            total.merge(flow)
        total.check(self.kind)
        if self.crew.is_first and (anew or not self.is_finished):
            for path in list(self.folder.rglob("*.tmp")):  # of kills; nobody writes here any more
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            wall, cpu = self._began
            timing = {
                "wall_s": round(time.monotonic() - wall, 3),
                "cpu_s": round(time.process_time() + self.crew.used.cpu_s - cpu, 3),
                "peak_process_bytes": max(self.crew.used.peak_bytes, peak_bytes()),
                "workers": self.crew.workers,
                "ranks": self.crew.place.world,
            }
            write_json(self.folder / TIMING_FILE, timing)
            parts = len(_parts_in(self.folder))
            report = {"step": self.kind, "parts": parts, **total.to_json(), **more}
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
        inside = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        # A kill may have left the beginning of step.json.
        if found is None and any(name != "ranks" and not name.endswith(".tmp") for name in inside):
            raise DataError(f"{self.folder} is in the way, no step made it; name another folder or remove it")
        for source in self._sources:
            step_parts(source)  # there is nothing to make it of if they are gone, so what is there stays
        self.crew.hold()
        if found is not None:
            told = _difference(found, self._head)
            if not renew:
                raise DataError(f"{self.folder} was made with {told}; name another folder or remove it")
            print(f"{self.kind}: made again, was made with {told}", file=sys.stderr, flush=True)
        with disk_errors(self.folder):
            if found is not None:
                _remove(self.folder, found)
            self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {**self._head, "fingerprint": self.fingerprint})


def step_parts(folder: Path) -> list[Path]:
    """The parts of a finished step, in order.

    Raises:  DataError if the folder is not one, the step is not finished, or parts of it are gone
    """
    fingerprint_of(folder)
    parts, made = _parts_in(folder), read_report(folder).get("parts")
    if len(parts) != made:
        raise DataError(
            f"{folder / PARTS} has {len(parts)} of {made} parts; remove {folder}, and run the command that "
            "makes it again"
        )
    return parts


def step_schema(folder: Path) -> pa.Schema | None:
    """The columns of a finished step's documents; None if it has no parts, or they are gone.

    Raises:  DataError if the folder is not one, the step is not finished, or a part is damaged
    """
    fingerprint_of(folder)
    parts = _parts_in(folder)
    return read_schema(parts[0]) if parts else None


def part_tasks(parts: Sequence[Path], work: Callable[[Path], dict[str, Any]]) -> list[Task]:
    """A task for each part: `work(path)`."""
    return [Task(path.stem, partial(work, path), path.stat().st_size) for path in parts]


def read_report(folder: Path) -> dict[str, Any]:
    """A finished step's report.

    Raises:  DataError if it is not finished or the report is damaged
    """
    if folder.is_file():
        raise DataError(f"{folder} is a file, not a step's folder; megalite data ingest makes one of it")
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


def _parts_in(folder: Path) -> list[Path]:
    return sorted((folder / PARTS).glob("part-*.parquet"))


def _difference(found: dict[str, Any], head: dict[str, Any]) -> str:
    """The first thing in which a step is not what it was, for people."""
    for key, (old, new) in changed_keys(found, head).items():
        if key != "fingerprint":
            return f"{key}={old!r}, not {new!r}"
    return f"another fingerprint than its {STEP_FILE} gives, which was edited or is damaged"


def _map_part(transform: Transform, folder: Path, source: Path) -> dict[str, Any]:
    flow = Flow()
    batches = transform(source, flow)
    first = next(batches)
    with PartWriter(folder / source.name, first.schema) as writer:
        for batch in chain([first], batches):
            writer.write(batch)
    return flow.to_json()


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _remove(folder: Path, head: dict[str, Any]) -> None:
    """Empty a step's folder but for `step.json`, in which it is no longer any step's from the first moment: a
    removal that is killed is taken up again whatever is wanted then, be it what had been there."""
    write_json(folder / STEP_FILE, {**head, "fingerprint": ""})
    (folder / REPORT_FILE).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name != STEP_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
