"""Who does the work: tasks shared out over processes and ranks, each done once, whatever is killed.

A phase is a list of independent tasks. Every task leaves a marker, a small JSON file with its result, after
its outputs are durable; a task with a marker is never done again. Task i belongs to rank i mod world, so any
number of machines that share a file system can run the same command; each waits for the others' markers
where a phase needs all of the last one. Results do not depend on the number of processes or ranks.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from megalite.data.folder import disk_errors
from megalite.data.staging import write_text
from megalite.errors import DataError
from megalite.lock import Lock
from megalite.progress import progress

if TYPE_CHECKING:
    from concurrent.futures import Future, ProcessPoolExecutor

PRESENCE_EVERY_S = 2.0
SILENT_S = 300.0  # a rank that was seen in this run and then not for so long is gone
TELL_EVERY_S = 30.0
POLL_S = 0.1


class Place(NamedTuple):
    """This process among those that run the same command."""

    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Task:
    """One unit of work: `run()` writes its outputs durably and returns its result as plain JSON values.

    `run` is sent to another process: a module's function, or a `functools.partial` of one.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    bytes: int = 0  # about how much text, for the progress display; it counts tasks if none has any


class Usage(NamedTuple):
    """What tasks took in worker processes: their processors' time, and the most memory one has had so far."""

    cpu_s: float = 0.0
    peak_bytes: int = 0


def place_from_environment(environ: Mapping[str, str] = os.environ) -> Place:
    """Rank and world as torchrun and deepspeed, a Slurm array, or srun announce them; else (0, 1).

    Raises:  DataError naming variables that contradict each other
    """
    for rank_key, world_key, first_key in (
        ("RANK", "WORLD_SIZE", None),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
        ("SLURM_PROCID", "SLURM_NTASKS", None),
    ):
        if rank_key in environ and world_key in environ:
            try:
                rank, world = int(environ[rank_key]), int(environ[world_key])
                rank -= int(environ.get(first_key, "0")) if first_key else 0
            except ValueError:
                rank = world = -1
            if not 0 <= rank < world:
                raise DataError(
                    f"{rank_key}={environ[rank_key]!r} with {world_key}={environ[world_key]!r}: expected "
                    "whole numbers, the first from 0 to one less than the second"
                )
            if first_key:
                _check_array(environ, first_key, world)
            return Place(rank, world)
    return Place()


def _check_array(environ: Mapping[str, str], first_key: str, world: int) -> None:
    """Raises:  DataError if an array has gaps, whose ranks the others would wait for"""
    first, last = (environ.get(key, "") for key in (first_key, "SLURM_ARRAY_TASK_MAX"))
    if first.isdecimal() and last.isdecimal() and int(last) - int(first) + 1 != world:
        raise DataError(
            f"a Slurm array of {world} tasks from {first} to {last} has gaps; give all ranks, such as "
            f"--array=0-{world - 1}"
        )


class Crew:
    """Worker processes of this rank, and the other ranks seen through the shared file system.

    `root` is the folder all of the work lies in, the same for every rank. With `workers=1` tasks run in
    this process. Use as a context manager; workers start when first needed.

    Raises:  BusyError when work starts, if another process works below `root` as the same rank
    """

    def __init__(self, root: Path, workers: int | None = None, place: Place | None = None) -> None:
        self.workers = _cores_a_rank(os.environ) if workers is None else workers
        self.place = place if place is not None else Place()
        self.used = Usage()
        self._presence = _Presence(root / "ranks", self.place)
        self._lock: Lock | None = None
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.place.world > 1:
            self.hold()  # before the others of a run at work are told of this one
            self._presence.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        if self.place.world > 1:
            self._presence.end(error)
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def is_first(self) -> bool:
        """Whether this rank does what is to be done once."""
        return self.place.rank == 0

    def hold(self) -> None:
        """Keep others from working here as this rank, to the end; done by itself before the first task.

        Raises:  BusyError if one does; two at once would mix what they write
        """
        if self._lock is None:
            self._lock = self._presence.lock()

    def run(self, folder: Path, tasks: Sequence[Task], title: str) -> list[dict[str, Any]]:
        """Do this rank's share of the tasks, wait for the others', return all results in task order.

        Markers lie in `folder`, which need not exist yet. Names must be plain and unique.

        Raises:  DataError of the task that failed, here or on another rank; or if a worker died
        """
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        results = {task.name: read_marker(folder, task.name) for task in tasks}
        mine = tasks[self.place.rank :: self.place.world]
        todo = [task for task in mine if results[task.name] is None]
        of_bytes = any(task.bytes for task in mine)
        sizes = {task.name: task.bytes if of_bytes else 1 for task in mine}
        total = sum(sizes.values())
        if todo:
            self.hold()
        with progress(title, of_bytes=of_bytes) as update:
            done = total - sum(sizes[task.name] for task in todo)
            for task, outcome in self._perform(folder, todo):
                results[task.name] = outcome
                done += sizes[task.name]
                update(done, total)
        self._await_others(folder, results, title)
        return [result for task in tasks if (result := results[task.name]) is not None]

    def wait_for(self, is_ready: Callable[[], bool], what: str) -> None:
        """Wait until rank 0 has done something; `what` completes "waiting for rank 0 to …"."""
        told = time.monotonic()
        while not is_ready():
            self._presence.check([0])
            told = _tell(told, f"waiting for rank 0 to {what}")
            time.sleep(POLL_S)

    def _perform(self, folder: Path, todo: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """Yield each task with its result, as they finish."""
        if self.workers == 1 or len(todo) == 1:
            for task in todo:
                yield task, _do(folder, task)
            return
        from concurrent.futures.process import BrokenProcessPool  # only where there are other processes

        waiting: dict[Future[tuple[dict[str, Any], Usage]], Task] = {}
        queue = iter(todo)
        try:
            # No more in flight than hands, so that what is left after an error is not done in vain.
            for task in queue:
                waiting[self._executor().submit(_do_and_measure, folder, task)] = task
                if len(waiting) > self.workers:
                    yield from self._finished(waiting)
            while waiting:
                yield from self._finished(waiting)
        except BrokenProcessPool:
            names = ", ".join(sorted(task.name for task in waiting.values()))
            raise DataError(
                f"a worker process died (killed, or out of memory) while these were worked on: {names}; "
                "what is finished is kept: run the command again, with fewer --workers if memory is short"
            ) from None
        finally:
            for future in waiting:
                future.cancel()

    def _finished(
        self, waiting: dict[Future[tuple[dict[str, Any], Usage]], Task]
    ) -> Iterator[tuple[Task, dict[str, Any]]]:
        from concurrent.futures import FIRST_COMPLETED, wait

        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            result, used = future.result()
            self.used = Usage(self.used.cpu_s + used.cpu_s, max(self.used.peak_bytes, used.peak_bytes))
            yield waiting.pop(future), result

    def _executor(self) -> ProcessPoolExecutor:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        if self._pool is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["data_tools.crew", "numpy", "pyarrow"])
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_start_worker)
        return self._pool

    def _await_others(self, folder: Path, results: dict[str, dict[str, Any] | None], title: str) -> None:
        names = list(results)
        told = time.monotonic()
        while missing := [number for number, name in enumerate(names) if results[name] is None]:
            for number in missing:
                results[names[number]] = read_marker(folder, names[number])
            ranks = sorted(
                {number % self.place.world for number in missing if results[names[number]] is None}
            )
            if ranks:
                self._presence.check(ranks)
                some = ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
                told = _tell(
                    told, f"{title}: waiting for {len(missing)} of {len(names)} parts, of rank {some}"
                )
                time.sleep(POLL_S)


def read_marker(folder: Path, name: str) -> dict[str, Any] | None:
    """The result a finished task left, None if it is not finished.

    Raises:  DataError if the marker is damaged
    """
    path = folder / f"{name}.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it, and the task is done again") from None
    if not isinstance(result, dict):
        raise DataError(f"{path} is damaged (not a JSON object); remove it, and the task is done again")
    return result


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears whole and durable, or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def peak_bytes() -> int:
    """The most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _cores_a_rank(environ: Mapping[str, str]) -> int:
    """The cores there are, shared with the other ranks of this machine that a launcher started."""
    cores = len(os.sched_getaffinity(0))
    local = environ.get("LOCAL_WORLD_SIZE", environ.get("SLURM_NTASKS_PER_NODE", ""))
    return max(1, cores // int(local)) if local.isdecimal() and int(local) else cores


def _do(folder: Path, task: Task) -> dict[str, Any]:
    result = task.run()
    write_json(folder / f"{task.name}.json", result)
    return result


def _do_and_measure(folder: Path, task: Task) -> tuple[dict[str, Any], Usage]:
    began = time.process_time()
    result = _do(folder, task)
    return result, Usage(time.process_time() - began, peak_bytes())


def _start_worker() -> None:
    """One thread each, and none that outlives a killed parent."""
    import multiprocessing
    from multiprocessing import connection

    import pyarrow as pa

    pa.set_cpu_count(1)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


class _Presence:
    """Shows the other ranks that this one lives, or of what it failed, and looks at theirs; and its lock.

    Ages are differences between file times of one file system, so clocks of machines do not matter.
    """

    def __init__(self, folder: Path, place: Place) -> None:
        self._folder, self._place = folder, place
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._seen: dict[int, float] = {}  # rank → time of its file, if it is of this run
        self._began = 0.0

    def begin(self) -> None:
        """Be seen from now on. What an earlier run left of this rank is cleared."""
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._path(self._place.rank, "failed").unlink(missing_ok=True)
        self._began = self._touch()
        self._thread.start()

    def lock(self) -> Lock:
        """That no other process works as this rank, where the file system knows locks.

        Raises:  BusyError naming who does
        """
        path = self._folder / f"{self._place.rank:05d}.lock"
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            return Lock(path, str(self._folder.parent), otherwise="write elsewhere")

    def end(self, error: BaseException | None) -> None:
        """Stop; after an error the others, who wait for what will not come, are told."""
        self._stop.set()
        self._thread.join()
        if error is not None:
            told = {"error": str(error) or type(error).__name__}
            write_json(self._path(self._place.rank, "failed"), told)

    def check(self, ranks: Sequence[int]) -> None:
        """Raises:  DataError if one of these has failed, or was seen in this run and is silent since"""
        now = self._touch()
        for rank in ranks:
            failed = self._path(rank, "failed")
            if _mtime(failed) > self._began and (report := read_marker(self._folder, failed.stem)):
                raise DataError(f"rank {rank} failed: {report.get('error')}")
            if (beat := _mtime(self._path(rank, "alive"))) > self._began:
                self._seen[rank] = beat
            if now - self._seen.get(rank, now) > SILENT_S:
                raise DataError(
                    f"rank {rank} has not been heard of for {SILENT_S:.0f} s (its process is gone or its "
                    "machine hangs); what is finished is kept: start the command again on all ranks"
                )

    def _path(self, rank: int, what: str) -> Path:
        return self._folder / f"{rank:05d}-{what}.json"

    def _touch(self) -> float:
        path = self._path(self._place.rank, "alive")
        with disk_errors(path):
            path.write_text("{}\n")
        return _mtime(path)

    def _beat(self) -> None:
        while not self._stop.wait(PRESENCE_EVERY_S):
            with suppress(DataError):  # a disk that is full for a while; the work itself tells if it stays so
                self._touch()


def _tell(told: float, line: str) -> float:
    """Print a line if it is time; when it was last told."""
    if time.monotonic() - told < TELL_EVERY_S:
        return told
    print(line, file=sys.stderr, flush=True)
    return time.monotonic()


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
