"""A run's saves: copied while training waits, written behind its back, and never more than one at a time.

    step 100            step 101 …                                     step 200
    │ copy to host │    training goes on                               │ wait for the last save, copy …
                   └─ thread: CRC, write, fsync, agree, rename, retain ┘

The thread talks over `mesh.saving`, which nobody else uses while a save is under way. What it finds out is
told on the main thread, by the next call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Protocol, Self

from torch.distributed import DistError

from megalite.checkpoint.commit import save
from megalite.checkpoint.format import TensorSlice
from megalite.checkpoint.interval import advice, estimate
from megalite.checkpoint.retention import Retention
from megalite.checkpoint.snapshots import Snapshot
from megalite.config import Config
from megalite.errors import CheckpointError, HangError, MegaliteError
from megalite.log import RunLog
from megalite.parallel.mesh import Mesh

_BYTES = 12  # a parameter: its weight and two moments in fp32
_TIMED_POLLS = 3  # the first comes after a step that may have compiled


class Source(Protocol):
    """What is saved: an engine."""

    def state_slices(self) -> Iterable[TensorSlice]:
        """This rank's part of a checkpoint, where it lies."""

    def snapshot(self, reuse: Snapshot | None = None) -> Snapshot:
        """A copy of this rank's state in host memory, `reuse`'s where given."""


@dataclass(frozen=True)
class _Save:
    """One save: how long training waited for it, and what came of it once its future is done."""

    step: int
    step_s: float  # of the steps before it, on average
    stall_s: float
    seconds: Future[float]  # from the copy to the commit; or the error


class Writer:
    """Saves one run's checkpoints, at most one at a time; every rank makes the same calls.

    Left by a `with` statement, it waits for the save under way, except when a peer is lost.
    """

    def __init__(self, config: Config, mesh: Mesh, log: RunLog, num_parameters: int) -> None:
        """For a run of a model of so many parameters."""
        self._root = Path(config.run_dir) / "checkpoints"
        self._config, self._mesh, self._log = config, mesh, log
        keys = config.checkpoint
        self._keep = Retention(keys.keep_last, keys.keep_every, keys.keep_best)
        self._under_way: _Save | None = None
        self._memory: Snapshot | None = None  # of the last save, for the next
        self._began_at, self._steps = time.perf_counter(), 0
        self._has_advised = keys.every_steps == 0
        replicas = mesh.dp.size if config.mesh.zero_stage == 0 else mesh.replicas.size
        self._share_bytes = _BYTES * num_parameters * replicas // mesh.size
        self._estimate: tuple[float, float] | None = None
        self._polled_at: list[float] = []  # after each of the first steps

    def __enter__(self) -> Self:
        """Try the disk, and begin to time the steps."""
        if not self._has_advised:
            self._estimate = estimate(self._root.parent, self._share_bytes, self._mesh.device)
        self._began_at = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif isinstance(error, MegaliteError) and not isinstance(error, HangError):
            with suppress(DistError):  # what ends the run is told, not what follows from it
                self.wait()

    def save(
        self, step: int, position: int, meta: dict[str, Any], source: Source, is_last: bool = False
    ) -> None:
        """Save this step; waits for the save before it.

        With `checkpoint.asynchronous` it returns once the state is copied. A save that fails leaves the older
        checkpoints as they are, is told in one line and in the ledger, and training goes on to the next.
        The last save of a process is waited for, needs no copy, and must succeed.

        Raises:  CheckpointError if `is_last` and it failed, the same on every rank; PeerError
        """
        began = time.perf_counter()
        step_s = (began - self._began_at) / max(self._steps, 1)
        self.wait()
        if is_last:
            self._commit(step, position, meta, source.state_slices)
            return
        if not self._config.checkpoint.asynchronous:
            seconds = _attempt(lambda: self._commit(step, position, meta, source.state_slices))
            self._under_way = _Save(step, step_s, time.perf_counter() - began, seconds)
            self.wait()
            return
        copy = _attempt(lambda: source.snapshot(self._memory))
        self._memory = copy.result() if copy.exception() is None else None

        def commit() -> float:
            # A rank that could not copy must say so where the others wait for it.
            slices, verify = lambda: copy.result().slices, lambda: copy.result().verify()
            return self._commit(step, position, meta, slices, verify)

        seconds = Future()  # of the thread, which may outlive a run whose peers are gone
        Thread(target=_fulfil, args=(seconds, commit), name="checkpoint", daemon=True).start()
        self._under_way = _Save(step, step_s, time.perf_counter() - began, seconds)

    def poll(self) -> None:
        """After each step: tell of a save that has finished meanwhile; does not wait.

        Raises:  PeerError if a peer was lost while saving
        """
        self._steps += 1
        if len(self._polled_at) < _TIMED_POLLS:
            self._polled_at.append(time.perf_counter())
            if len(self._polled_at) == _TIMED_POLLS:
                self._advise_early()
        if self._under_way is not None and self._under_way.seconds.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way, if there is one, and tell what came of it.

        Raises:  PeerError if a peer was lost while saving
        """
        if self._under_way is None:
            return
        done, self._under_way = self._under_way, None
        try:
            seconds = done.seconds.result()
        except CheckpointError as error:
            self._log.say(f"alert: {error}; training goes on, the next save is tried as planned")
            self._log.event("save_failed", done.step, reason=str(error))
        else:
            self._advise(done, seconds)

    def _commit(
        self,
        step: int,
        position: int,
        meta: dict[str, Any],
        slices: Callable[[], Iterable[TensorSlice]],
        verify: Callable[[], None] = lambda: None,
    ) -> float:
        """Seconds it took."""
        began = time.perf_counter()
        save(self._root, step, position, slices, meta, self._mesh, self._keep, verify)
        return time.perf_counter() - began

    def _advise_early(self) -> None:
        """Before the first save, which may be hours ahead: whether the interval fits what it will cost."""
        if self._has_advised or self._estimate is None:
            return
        copy_s, write_s = self._estimate
        stall_s = copy_s if self._config.checkpoint.asynchronous else write_s
        first, *_, last = self._polled_at
        self._say_advice((last - first) / (_TIMED_POLLS - 1), stall_s, write_s, is_estimate=True)

    def _advise(self, done: _Save, seconds: float) -> None:
        """Once, after the first save: whether `checkpoint.every_steps` fits what it cost."""
        if not self._has_advised:
            self._has_advised = True
            self._say_advice(done.step_s, done.stall_s, seconds, is_estimate=False)

    def _say_advice(self, step_s: float, stall_s: float, write_s: float, is_estimate: bool) -> None:
        every_steps = self._config.checkpoint.every_steps
        mtbf_s = self._config.resilience.mtbf_hours * 3600 / self._mesh.size
        line = advice(every_steps, step_s, stall_s, write_s, mtbf_s, is_estimate)
        if line is not None:
            self._log.say(line)


def _attempt(action: Callable[[], Any]) -> Future[Any]:
    """What `action` returns or raises, done."""
    future: Future[Any] = Future()
    _fulfil(future, action)
    return future


def _fulfil(future: Future[Any], action: Callable[[], Any]) -> None:
    try:
        future.set_result(action())
    except Exception as error:
        future.set_exception(error)
