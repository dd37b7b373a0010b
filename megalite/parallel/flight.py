"""The flight log: the last 256 communications of this process, in memory that outlives it.

Once attached, the log lies in a memory-mapped file: the others read what a rank that was killed, was stopped
or aborts inside its backend did last. Collectives are counted for each group, messages for each pair of
ranks and direction. All ranks of a group begin the same ones in the same order, so equal numbers belong
together, and who has a lower number than the others has not come to what they wait for.

    header   "megalite", bytes of what follows; a JSON object: who this is, its groups
    records  256 of `_RECORD`, the n-th in place n % 256; those that are zero were not used
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import struct
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

CAPACITY = 256
OPS = ("all_reduce", "reduce_scatter", "all_gather", "send", "receive", "reduce", "broadcast")
ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, SEND, RECEIVE, REDUCE, BROADCAST = range(len(OPS))
_DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool),
)
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_UNNAMED = len(_DTYPES)  # any other dtype

UNDER_WAY, AWAITED = 0.0, -1.0
BACKGROUND = "saving"  # the group of the thread that writes checkpoints, which no step waits for

_MAGIC = b"megalite"
_HEAD = struct.Struct("<8sI")
_RECORD = struct.Struct("<QQ4IHBBidd")  # number, bytes, shape, group, op, dtype, peer, begun, ended
_ENDED = struct.Struct("<d")
_HEAD_BYTES = 16384
_FILE_BYTES = _HEAD_BYTES + CAPACITY * _RECORD.size


@dataclass(frozen=True)
class Entry:
    """One communication. Times are of the monotonic clock of its host; `ended` is `UNDER_WAY` until the host
    waits for it, and `AWAITED` until it has it (a CUDA device may get there later).

    `ranks` are the group's, numbered in the world; for a message the sender and the receiver.
    """

    number: int
    op: str
    group: str
    ranks: tuple[int, ...]
    bytes: int
    dtype: str
    shape: tuple[int, ...]
    begun: float
    ended: float

    @property
    def what(self) -> tuple[str, int, str]:
        """What all of its ranks must agree on."""
        op = "message" if self.op in ("send", "receive") else self.op
        return op, self.bytes, self.dtype

    def __str__(self) -> str:
        route = f"rank {self.ranks[0]} → {self.ranks[-1]}, " if self.op in ("send", "receive") else ""
        return (
            f"{self.op} number {self.number} of group {self.group} ({route}{self.bytes:,} bytes, "
            f"{self.dtype} {list(self.shape)})"
        )


class Place(NamedTuple):
    """Where the log has a communication that has begun; those in the background are no step's wait."""

    at: int
    is_timed: bool


class Wait(NamedTuple):
    """When the host began to wait, and an event that tells when its CUDA stream did."""

    began: float
    event: torch.cuda.Event | None


class FlightLog:
    """Notes communications as they begin and end; each process has one, which a monitor may read any time."""

    def __init__(self) -> None:
        self.count = 0  # communications ever begun
        self._indices = itertools.count()  # which two threads may draw from at once
        self._waited_s = 0.0
        # On a CUDA device, whose host does not wait: events before and after each wait of its stream.
        self._stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None
        self._buffer: bytearray | mmap.mmap = bytearray(_FILE_BYTES)
        self._path: Path | None = None
        self._who: dict[str, Any] = {}
        self._groups: list[tuple[str, tuple[int, ...]]] = []
        self._group_codes: dict[dist.ProcessGroup, int] = {}
        # Of a group, or of a message's (group, op, peer): the group's code, how many have begun.
        self._counters: dict[Any, list[int]] = {}

    def begin(self, op: int, name: str, group: dist.ProcessGroup, tensor: Tensor, peer: int = -1) -> Place:
        """Note that a communication is about to begin; returns what `await_` and `end` want to know."""
        key = group if peer < 0 else (group, op, peer)
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = [self._code(name, group), 0]
        counter[1] += 1
        index = next(self._indices)
        a, b, c, d = (*tensor.shape, 0, 0, 0, 0)[:4]
        dtype = _DTYPE_CODES.get(tensor.dtype, _UNNAMED)
        place = _HEAD_BYTES + index % CAPACITY * _RECORD.size
        code, number = counter
        # fmt: off
        _RECORD.pack_into(self._buffer, place, number, tensor.nbytes, a, b, c, d, code, op, dtype, peer,
                          time.monotonic(), UNDER_WAY)
        # fmt: on
        self.count = index + 1
        return Place(index, name != BACKGROUND)

    def await_(self, place: Place) -> Wait:
        """Note that the host begins to wait for it; returns what `end` wants to know."""
        self._set_ended(place.at, AWAITED)
        # None in the background, whose thread has another current device, and would give that one a context.
        is_on_device = place.is_timed and self._stalls is not None
        return Wait(time.monotonic(), _recorded_event() if is_on_device else None)

    def end(self, place: Place, wait: Wait) -> None:
        """Note that the host has it."""
        now = time.monotonic()
        self._set_ended(place.at, now)
        if place.is_timed:
            self._waited_s += now - wait.began
        if self._stalls is not None and wait.event is not None:
            self._stalls.append((wait.event, _recorded_event()))

    def time_device(self) -> None:
        """From now on time the current CUDA stream's waits too."""
        self._stalls = deque()

    def take_waited_s(self) -> float:
        """How long the host, or the CUDA stream, has waited for others since the last call, but for saves."""
        waited_s, self._waited_s = self._waited_s, 0.0
        while self._stalls:
            begun, ended = self._stalls[0]
            if not ended.query():  # type: ignore[no-untyped-call]
                break  # the rest is for the next call
            waited_s += begun.elapsed_time(ended) / 1000
            self._stalls.popleft()
        return waited_s

    def _set_ended(self, index: int, value: float) -> None:
        if self.count - index <= CAPACITY:  # else another has its place
            place = _HEAD_BYTES + index % CAPACITY * _RECORD.size + _RECORD.size - _ENDED.size
            _ENDED.pack_into(self._buffer, place, value)

    def attach(self, path: Path, who: dict[str, Any]) -> None:
        """Continue in a file, under what `who` says of this process.

        Raises:  OSError if it cannot be made, or its disk is full; the log then stays in memory
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.posix_fallocate(file, 0, _FILE_BYTES)  # or a full disk would be a bus error later
            mapped = mmap.mmap(file, _FILE_BYTES)
        finally:
            os.close(file)
        mapped[:] = bytes(self._buffer)
        self._buffer, self._path, self._who = mapped, path, dict(who)
        self._write_head()

    def detach(self, keeps_file: bool) -> None:
        """Continue in memory alone, and leave the file behind or delete it."""
        if self._path is not None and isinstance(self._buffer, mmap.mmap):
            mapped, self._buffer = self._buffer, bytearray(self._buffer)
            mapped.close()
            if not keeps_file:
                self._path.unlink(missing_ok=True)
                with suppress(OSError):  # others' are still there
                    self._path.parent.rmdir()
            self._path = None

    def entries(self) -> list[Entry]:
        """What is in the log, oldest first."""
        return _entries(bytes(self._buffer), self._groups, self._who.get("rank", 0))

    def forget(self) -> None:
        """Let go of the process groups; what comes after is counted from one."""
        self._group_codes.clear()
        self._counters.clear()
        self._groups.clear()
        self._buffer[_HEAD_BYTES:] = bytes(_FILE_BYTES - _HEAD_BYTES)

    def _code(self, name: str, group: dist.ProcessGroup) -> int:
        if group not in self._group_codes:
            self._group_codes[group] = len(self._groups)
            self._groups.append((name, tuple(dist.get_process_group_ranks(group))))
            self._who["rank"] = dist.get_rank()
            self._write_head()
        return self._group_codes[group]

    def _write_head(self) -> None:
        groups = [[name, *_as_range(ranks)] for name, ranks in self._groups]
        text = json.dumps({**self._who, "groups": groups}).encode()
        if len(text) <= _HEAD_BYTES - _HEAD.size:
            self._buffer[_HEAD.size : _HEAD.size + len(text)] = text
            _HEAD.pack_into(self._buffer, 0, _MAGIC, len(text))


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


flight_log = FlightLog()
"""This process's. The one mutable thing here that no argument carries: a collective deep in a backward pass
writes it, and a thread that has nothing but the process reads it."""


def read_flight_file(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Who left this file, and what it did last.

    Raises:  OSError, ValueError if it is missing or not a flight log
    """
    data = path.read_bytes()
    if len(data) != _FILE_BYTES or data[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"{path} is not a flight log of {_FILE_BYTES} bytes")
    _, length = _HEAD.unpack_from(data)
    who = json.loads(data[_HEAD.size : _HEAD.size + min(length, _HEAD_BYTES)])
    groups = [(name, tuple(range(start, stop, step))) for name, start, stop, step in who.pop("groups")]
    return who, _entries(data, groups, who["rank"])


def entry_to_json(entry: Entry) -> dict[str, Any]:
    """An entry as JSON can hold it."""
    return asdict(entry)


def entry_from_json(value: dict[str, Any]) -> Entry:
    """The inverse of `entry_to_json`."""
    return Entry(**{**value, "ranks": tuple(value["ranks"]), "shape": tuple(value["shape"])})


def _entries(data: bytes, groups: list[tuple[str, tuple[int, ...]]], rank: int) -> list[Entry]:
    found = []
    for record in _RECORD.iter_unpack(data[_HEAD_BYTES:]):
        number, size, *shape, group, op, dtype, peer, begun, ended = record
        if number == 0:
            continue
        name, ranks = groups[group]
        if peer >= 0:
            ranks = (rank, ranks[peer]) if op == SEND else (ranks[peer], rank)
        found.append(
            Entry(
                number,
                OPS[op],
                name,
                ranks,
                size,
                str(_DTYPES[dtype]).removeprefix("torch.") if dtype < _UNNAMED else "?",
                tuple(length for length in shape if length),
                begun,
                ended,
            )
        )
    return sorted(found, key=lambda entry: entry.begun)


def _as_range(ranks: tuple[int, ...]) -> tuple[int, int, int]:
    """(start, stop, step) of a group's ranks: along an axis of the mesh they are equally far apart."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    return ranks[0], ranks[0] + step * len(ranks), step
