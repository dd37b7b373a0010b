"""Killing a rank just before any line of the checkpoint code, without a hook in that code."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from megalite.parallel.collectives import all_reduce
from megalite.parallel.mesh import Mesh, build_mesh
from tests.ranks import join_ranks, spawn_ranks

Point = tuple[str, int, int]  # file, line, how often it has run
Action = Callable[[Mesh, str], None]


class OnEachLine:
    """While entered, `seen` hears of each line of the given files, before it runs, in every thread."""

    def __init__(self, files: tuple[str, ...], seen: Callable[[Point], None]) -> None:
        self.files, self.seen = files, seen
        self.hits: Counter[tuple[str, int]] = Counter()

    def __enter__(self) -> None:
        threading.settrace(self._trace)
        sys.settrace(self._trace)

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            self.hits[place] += 1
            self.seen((*place, self.hits[place]))
        return self._trace


def record_lines(mesh: Mesh, action: Action, root: str, files: tuple[str, ...]) -> list[Point]:
    """Every line of these files that ran on this rank, by turns the first and the last time it did."""
    first: dict[tuple[str, int], Point] = {}
    last: dict[tuple[str, int], Point] = {}

    def seen(point: Point) -> None:
        first.setdefault(point[:2], point)
        last[point[:2]] = point

    with OnEachLine(files, seen):
        action(mesh, root)
    return [(first, last)[number % 2][place] for number, place in enumerate(sorted(first))]


def meet() -> Mesh:
    """This process's place, once every rank has its own: a peer that dies earlier would spoil the meeting."""
    mesh = build_mesh()
    all_reduce(torch.ones(1), mesh.world)
    return mesh


def act_and_die(action: Action, root: str, files: tuple[str, ...], rank: int, at: Point) -> None:
    """Act on two ranks; `rank` is killed just before the given line."""
    mesh = meet()

    def seen(point: Point) -> None:
        if point == at:
            os.kill(os.getpid(), signal.SIGKILL)

    if mesh.rank != rank:
        sys.stderr = io.StringIO()  # the survivor's traceback is expected
        action(mesh, root)
        return
    with OnEachLine(files, seen):
        action(mesh, root)


def kill(action: Action, root: str, files: tuple[str, ...], rank: int, at: Point) -> None:
    """One case: the rank really died there, and its peer did not wait for it for ever."""
    exits = join_ranks(spawn_ranks(act_and_die, 2, action, root, files, rank, tuple(at)))
    assert exits[rank] == -signal.SIGKILL, f"rank {rank} never came to {at}"
