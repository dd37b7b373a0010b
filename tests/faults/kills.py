"""Killing a rank just before any line of the checkpoint code, without a hook in that code."""

from __future__ import annotations

import io
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Self

import torch

from megalite.parallel.collectives import all_reduce
from megalite.parallel.mesh import Mesh, build_mesh
from tests.ranks import join_ranks, spawn_ranks

Point = tuple[str, int, int]  # file, line, how often it has run
Action = Callable[[Mesh, str], None]


class OnEachLine:
    """While entered, `seen` hears of each line of the given files, before it runs.

    Also of functions that are under way already, and in threads that begin meanwhile.
    """

    def __init__(self, files: tuple[str, ...], seen: Callable[[Point], None]) -> None:
        self.files, self.seen = files, seen
        self._hits: dict[tuple[str, int], Iterator[int]] = {}

    def __enter__(self) -> Self:
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename in self.files:
                frame.f_trace = self._trace
            frame = frame.f_back
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            # Two threads may be at one line: each call here that counts is a single one of the interpreter's.
            self.seen((*place, next(self._hits.setdefault(place, itertools.count(1)))))
        return self._trace


class Recorded(OnEachLine):
    """Remembers the lines that ran."""

    def __init__(self, files: tuple[str, ...]) -> None:
        self._first: dict[tuple[str, int], Point] = {}
        self._last: dict[tuple[str, int], Point] = {}
        super().__init__(files, self._note)

    @property
    def points(self) -> list[Point]:
        """Every line that ran, by turns the first and the last time it did."""
        return [(self._first, self._last)[n % 2][place] for n, place in enumerate(sorted(self._first))]

    def _note(self, point: Point) -> None:
        self._first.setdefault(point[:2], point)
        self._last[point[:2]] = point


def dies_at(files: tuple[str, ...], at: Point) -> OnEachLine:
    """Kills this process just before the given line."""

    def seen(point: Point) -> None:
        if point == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return OnEachLine(files, seen)


def record_lines(mesh: Mesh, action: Action, root: str, files: tuple[str, ...]) -> list[Point]:
    """The points at which a kill may strike this rank: see `Recorded`."""
    with Recorded(files) as lines:
        action(mesh, root)
    return lines.points


def one_rank_each(recorded: Sequence[Sequence[Point]]) -> list[tuple[Point, int]]:
    """(point, rank) of each line that any rank ran; one that several ran is met on one of them, by turns."""
    by_line: dict[tuple[str, int], list[tuple[Point, int]]] = {}
    for rank, points in enumerate(recorded):
        for point in points:
            by_line.setdefault(point[:2], []).append((point, rank))
    return [met[number % len(met)] for number, met in enumerate(by_line.values())]


def meet() -> Mesh:
    """This process's place, once every rank has its own: a peer that dies earlier would spoil the meeting."""
    mesh = build_mesh()
    all_reduce(torch.ones(1), mesh.world)
    return mesh


def act_and_die(action: Action, root: str, files: tuple[str, ...], rank: int, at: Point) -> None:
    """Act on two ranks; `rank` is killed just before the given line."""
    mesh = meet()
    if mesh.rank != rank:
        sys.stderr = io.StringIO()  # the survivor's traceback is expected
        action(mesh, root)
        return
    with dies_at(files, at):
        action(mesh, root)


def kill(action: Action, root: str, files: tuple[str, ...], rank: int, at: Point) -> None:
    """One case: the rank really died there, and its peer did not wait for it for ever."""
    exits = join_ranks(spawn_ranks(act_and_die, 2, action, root, files, rank, tuple(at)))
    assert exits[rank] == -signal.SIGKILL, f"rank {rank} never came to {at}"
