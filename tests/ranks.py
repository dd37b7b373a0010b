"""Multi-process cases at the price of a function call.

`run_ranks` sends a function to warm workers: processes that have torch imported and a gloo group
connected, kept from test to test, one pool per world size. `spawn_ranks` starts fresh processes that a
test may kill. Both come out of a fork server that imported torch once. Ranks meet in a file, so no port
is guessed (and a TCPStore on the loopback now and then takes five seconds to accept its clients).
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from megalite.parallel.mesh import Axis, Mesh, build_mesh

# The last is what torch imports at a pipeline stage's first backward.
PRELOAD = ["torch", "torch.distributed", "megalite.trainer", "numpy", "pytest", "hypothesis"]
PRELOAD += ["torch.fx.experimental.symbolic_shapes"]
SOLO = Mesh(rank=0, size=1, dp=Axis(), device=torch.device("cpu"))  # for code that needs no second rank
_GRACE_S = 0.3  # for the other ranks to report as well, once one has failed

_groups = itertools.count()
_pools: dict[int, _Pool] = {}


class Place(NamedTuple):
    """A rank, the size of its world, and the file in which the world meets."""

    rank: int
    world: int
    meeting: str


class RanksError(Exception):
    """A rank raised, died or did not finish; the message names it and holds its traceback."""


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout_s: float = 60) -> list[Any]:
    """Call `function(mesh, *args)` on each of `world` warm ranks; results in rank order.

    The function is a module-level one; arguments and results are plain values. Workers live on, so it
    leaves the process as it found it. After a failure the pool is torn down and built anew when needed.

    Raises:  RanksError
    """
    pool = _pools.get(world) or _pools.setdefault(world, _Pool(world))
    try:
        return pool.run(function, args, timeout_s)
    except BaseException:
        _pools.pop(world).stop()
        raise


def spawn_ranks(
    function: Callable[..., Any], world: int, *args: Any, comm_timeout_s: float = 60
) -> list[ForkServerProcess]:
    """Start `function(*args)` in `world` fresh processes, as a launcher would: it calls `build_mesh` itself.

    The group is connected already, with this timeout for its collectives.
    """
    processes = [
        _context().Process(target=_run_alone, args=(place, comm_timeout_s, function, args), daemon=True)
        for place in _places(world)
    ]
    for process in processes:
        process.start()
    return processes


def join_ranks(processes: Sequence[ForkServerProcess], timeout_s: float = 60) -> list[int]:
    """Wait for processes of `spawn_ranks`; their exit codes in rank order, -9 for one that was killed.

    Raises:  RanksError naming the ranks still running at the timeout, which are killed
    """
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    running = [rank for rank, process in enumerate(processes) if process.is_alive()]
    _kill(processes)
    if running:
        raise RanksError(f"not finished after {timeout_s} s: ranks {running}")
    return [process.exitcode or 0 for process in processes]


def close_pools() -> None:
    """End all warm workers."""
    while _pools:
        _pools.popitem()[1].stop()


class _Pool:
    """Warm workers of one world size, each at the other end of a pipe."""

    def __init__(self, world: int) -> None:
        self.processes: list[ForkServerProcess] = []
        self.pipes: list[Connection] = []
        for place in _places(world):
            ours, theirs = _context().Pipe()
            process = _context().Process(target=_serve, args=(theirs, place), daemon=True)
            process.start()
            theirs.close()  # so that the worker's death closes the pipe
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send(sys.path)  # the pool may be older than the test module's folder in it
            pipe.send((function, args))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout_s
        waiting = dict(zip(self.pipes, range(len(self.pipes)), strict=True))
        while waiting:
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    done, value = pipe.recv()
                except (EOFError, ConnectionError):
                    self.processes[rank].join(1)
                    done, value = False, f"died with exit code {self.processes[rank].exitcode}"
                (results if done else failures)[rank] = value
                if not done and len(failures) == 1:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        if failures:
            raise RanksError("\n".join(f"rank {rank}: {text}" for rank, text in failures.items()))
        if waiting:
            ranks = sorted(waiting.values())
            raise RanksError(f"{function.__qualname__} not finished after {timeout_s} s: ranks {ranks}")
        return [results[rank] for rank in range(len(self.pipes))]

    def stop(self) -> None:
        _kill(self.processes)
        for pipe in self.pipes:
            pipe.close()


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # What torch reads when it is imported: one thread, and no word on the peers that tests kill.
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="FATAL"):
        forkserver.ensure_running()
    return context


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="megalite-ranks-")


def _places(world: int) -> list[Place]:
    """Each rank's place in a new group."""
    meeting = os.path.join(_folder().name, str(next(_groups)))
    return [Place(rank, world, meeting) for rank in range(world)]


def _join_group(place: Place, timeout_s: float) -> None:
    """Set what a launcher sets, and connect the group that `build_mesh` will then find."""
    os.environ.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(place.rank),
        WORLD_SIZE=str(place.world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    if place.world > 1:
        store = dist.FileStore(place.meeting, place.world)
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", timeout=timeout, store=store, rank=place.rank, world_size=place.world)


def _serve(pipe: Connection, place: Place) -> None:
    """A worker's life: join the group, then one call after another until the pipe closes."""
    _join_group(place, timeout_s=600)
    mesh = build_mesh()
    while True:
        try:
            sys.path[:] = pipe.recv()
            function, args = pipe.recv()
            pipe.send((True, function(mesh, *args)))
        except EOFError:
            return
        except BaseException:  # SystemExit too: whatever ended the call is the test's to see
            pipe.send((False, traceback.format_exc()))


def _run_alone(place: Place, timeout_s: float, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _join_group(place, timeout_s)
    function(*args)


def _kill(processes: Sequence[ForkServerProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
