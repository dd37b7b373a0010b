"""Steps that do not end: a thread that notices, names the rank that is behind, and ends the process with 76.

The ranks need no working group to talk: each that notices, or sees that another has, writes what it knows
into RUN_DIR/hangs/START, and the lowest rank that can still speak compares. A rank that was stopped, died,
or holds the interpreter's lock cannot write; its silence names it, and its flight log, a memory-mapped file,
is read in its stead. Of one that holds the lock `faulthandler`, which needs no lock, prints the stacks.

Only steps have a deadline. In evaluation, saves and start-up the backend's timeout counts, and this process's
thread still answers when another rank asks.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import torch.distributed as dist

from megalite.errors import (
    CheckpointError,
    DivergedError,
    HangError,
    MegaliteError,
    PreemptedError,
    first_line,
)
from megalite.parallel.collectives import gather_json
from megalite.parallel.flight import entry_from_json, entry_to_json, flight_log, read_flight_file
from megalite.parallel.mesh import Mesh
from megalite.resilience.exits import record_exit
from megalite.resilience.verdict import RankState, judge, name_ranks

_TICK_S = 0.25
_MEDIAN_STEPS = 10  # the deadline, where steps are long
_REMEMBERED = 32  # steps the median is of
_STOPPED_S = 2.0  # a thread that was away for longer was stopped, with all of its process
_ANSWER_S = 2.0  # for ranks to say where they are
_PATIENCE = 2  # times that, for one that runs on this host and may only be short of processor time
_LAST_S = 20.0  # then the process ends, even if run_dir hangs itself


class Watchdog:
    """Within this context each `step()` must end in time; the errors of lost peers become a `HangError`.

    `floor_s` is the least deadline; else it is ten times the median of the last steps. The first two steps
    have none: one may compile, and one must be measured.
    """

    def __init__(self, run_dir: Path, mesh: Mesh, floor_s: float) -> None:
        self.run_dir, self.mesh, self.floor_s = run_dir, mesh, floor_s
        self.number = 0  # of the step under way
        self._began: float | None = None
        self._is_warm = False  # whether the first step, which may compile, is over
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._left = threading.Event()

    def __enter__(self) -> Self:
        """Meet the other ranks, and begin to watch. A collective over the world."""
        mesh = self.mesh
        me = {"host": socket.gethostname(), "pid": os.getpid(), "start": int(time.time() * 1000)}
        self.roster = gather_json(me, mesh.world, mesh.device)
        self.folder = self.run_dir / "hangs" / str(self.roster[0]["start"])
        if mesh.size > 1:
            try:
                flight_log.attach(self._flight(mesh.rank), {"rank": mesh.rank, "pid": os.getpid()})
            except OSError as error:
                _say(f"rank {mesh.rank}: no flight log in {self.run_dir}: {error.strerror}")
        self._left.clear()
        self._thread = threading.Thread(target=self._watch, name="megalite-watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join(_LAST_S)  # should it be reporting, it ends the process
        faulthandler.cancel_dump_traceback_later()
        try:
            if isinstance(error, dist.DistError):
                raise HangError(self._lost(error)) from error
            if isinstance(error, Exception) and self.mesh.size > 1 and not _is_everybodys(error):
                with suppress(OSError):
                    self._write_state(f"{type(error).__name__}: {error}")
        finally:
            flight_log.detach(keeps_file=error is not None)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step, from waiting for its data to the weights' update."""
        self.number, self._began = number, time.monotonic()
        yield
        if self._is_warm:
            self._durations.append(time.monotonic() - self._began)
        self._began, self._is_warm = None, True

    @property
    def deadline_s(self) -> float | None:
        """How long a step may take now; None until one has been measured."""
        if not self._durations:
            return None
        return max(self.floor_s, _MEDIAN_STEPS * statistics.median(list(self._durations)))

    # --- the thread -------------------------------------------------------------------------------

    def _watch(self) -> None:
        last, armed, count = time.monotonic(), 0.0, -1
        watched: float | None = None  # when the step began that `stopped_s` is of
        stopped_s = 0.0  # how long all of this process was stopped in it
        while not self._left.wait(_TICK_S):
            now, began, deadline_s = time.monotonic(), self._began, self.deadline_s
            if began != watched:
                watched, stopped_s = began, 0.0
            elif now - last > _STOPPED_S:
                stopped_s += now - last
            last = now
            if deadline_s is not None and now - armed > deadline_s / 8:
                armed = now  # it goes off only if nobody comes here to put it off
                faulthandler.dump_traceback_later(deadline_s, file=2)
            if began is not None and deadline_s is not None and now - began - stopped_s > deadline_s:
                self._end(f"step {self.number} did not end within {deadline_s:.0f} s")
            if flight_log.count == count and self.mesh.size > 1 and self.folder.exists():
                self._end("another rank is in trouble")
            count = flight_log.count

    def _end(self, reason: str) -> NoReturn:
        """Report, and end this process."""
        threading.Timer(_LAST_S, _exit).start()
        try:
            faulthandler.cancel_dump_traceback_later()
            text = self._report()
            if text is not None:
                _say(f"megalite: rank {self.mesh.rank}: HangError: {reason}: {text}")
        except Exception:  # whatever it is must not keep a hung process alive
            traceback.print_exc()
        finally:
            _exit()

    def _lost(self, error: BaseException) -> str:
        """What to say of a communication that the backend gave up."""
        line = first_line(error)
        try:
            text = self._report()
        except OSError as failure:
            text = f"no report in {self.folder}: {failure.strerror}"
        found = f"{text}; " if text else ""
        return f"a peer is gone or silent: {found}({line}); start the same command again to continue"

    # --- the report -------------------------------------------------------------------------------

    def _report(self) -> str | None:
        """Say what this rank knows; on the lowest rank that speaks, compare, write it down and return it."""
        self._write_state()
        asked = time.monotonic()
        report = self.folder / "report.txt"
        while not self._is_first(asked):
            if report.exists() or time.monotonic() - asked > _LAST_S / 2:
                return None
            time.sleep(0.05)
        while self._may_still_speak(range(self.mesh.size), asked):
            time.sleep(0.05)
        states = [self._state(rank) for rank in range(self.mesh.size)]
        verdict = judge(states)
        stacks = "\n".join(_describe_stacks(states))
        fresh = report.with_suffix(".tmp")
        fresh.write_text(f"{verdict.text}\n\n{stacks}\n", encoding="utf-8")
        os.replace(fresh, report)
        _say(stacks)
        return f"{verdict.text} (stacks and flight logs of all ranks: {self.folder})"

    def _write_state(self, error: str = "") -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.number,
            "error": error,
            "is_host_bound": self.mesh.device.type == "cpu",
            "stacks": _stacks(),
            "flight": [entry_to_json(entry) for entry in flight_log.entries()],
        }
        fresh = self._answer(self.mesh.rank).with_suffix(".tmp")
        fresh.write_text(json.dumps(state), encoding="utf-8")
        os.replace(fresh, self._answer(self.mesh.rank))

    def _is_first(self, asked: float) -> bool:
        """Whether no lower rank will speak; False while that is open."""
        lower = range(self.mesh.rank)
        return not any(self._answer(rank).exists() for rank in lower) and not self._may_still_speak(
            lower, asked
        )

    def _may_still_speak(self, ranks: range, asked: float) -> bool:
        waited = time.monotonic() - asked
        for rank in ranks:
            if self._answer(rank).exists():
                continue
            looks = self._look(rank)
            patience = {"runs": _PATIENCE * _ANSWER_S, "": _ANSWER_S}.get(looks, 2 * _TICK_S)
            if waited < patience:
                return True
        return False

    def _look(self, rank: int) -> str:
        """How a rank of this host looks from outside: "runs", "is stopped" or "is gone"; else nothing."""
        who = self.roster[rank]
        if who["host"] != socket.gethostname():
            return ""
        try:
            stat = Path(f"/proc/{who['pid']}/stat").read_text()
        except OSError:
            return "is gone"
        state = stat.rpartition(")")[2].split()[0]
        return {"T": "is stopped", "t": "is stopped", "Z": "is gone", "X": "is gone"}.get(state, "runs")

    def _state(self, rank: int) -> RankState:
        host = self.roster[rank]["host"]
        with suppress(OSError, ValueError):
            found = json.loads(self._answer(rank).read_text(encoding="utf-8"))
            flight = [entry_from_json(entry) for entry in found.pop("flight")]
            return RankState(rank=rank, host=host, entries=flight, **found)
        silence = {"runs": "runs but does not answer", "": "does not answer"}.get(
            self._look(rank), self._look(rank)
        )
        entries = []
        with suppress(OSError, ValueError):
            who, found = read_flight_file(self._flight(rank))
            entries = found if who["pid"] == self.roster[rank]["pid"] else []
        is_host_bound = self.mesh.device.type == "cpu"
        return RankState(rank, host, self.number, entries, {}, "", silence, is_host_bound)

    def _answer(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.json"

    def _flight(self, rank: int) -> Path:
        return self.run_dir / "flight" / f"rank_{rank:05d}.bin"


def _is_everybodys(error: Exception) -> bool:
    """Whether all ranks raise it together, so that nobody needs to be told."""
    together = isinstance(error, (PreemptedError, DivergedError, CheckpointError))
    return together or (isinstance(error, MegaliteError) and error.is_shared)


def _stacks() -> dict[str, list[str]]:
    """Each thread's frames but this one's, innermost first. Without source lines: disks may hang too."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = {}
    for ident, frame in sys._current_frames().items():
        if ident == threading.get_ident() and ident != threading.main_thread().ident:
            continue
        summary = traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)
        found[names.get(ident, str(ident))] = [f"{f.filename}:{f.lineno} in {f.name}" for f in summary]
    return found


def _describe_stacks(states: list[RankState]) -> list[str]:
    """Every rank's stacks; those that are the same are told once."""
    by_stack: dict[tuple[str, ...], list[int]] = {}
    for state in states:
        for thread, frames in state.stacks.items():
            by_stack.setdefault((thread, *frames), []).append(state.rank)
    lines = []
    for (thread, *frames), ranks in by_stack.items():
        lines += [f"{name_ranks(ranks)}, {thread}, innermost first:", *(f"  {frame}" for frame in frames)]
    return lines


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # whoever watched may have left
        print(text, file=sys.stderr, flush=True)


def _exit() -> NoReturn:
    record_exit(HangError.exit_code)
    os._exit(HangError.exit_code)
