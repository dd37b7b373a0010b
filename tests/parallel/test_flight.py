"""The flight log: what every communication leaves behind, also when its process is killed."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from pathlib import Path
from unittest import mock

import pytest
import torch

from megalite.parallel import flight
from megalite.parallel.collectives import (
    all_reduce,
    gather_json,
    start_all_gather,
    start_receive,
    start_reduce_scatter,
    start_send,
)
from megalite.parallel.flight import AWAITED, CAPACITY, Entry, FlightLog, flight_log, read_flight_file
from megalite.parallel.mesh import Mesh, MeshShape, build_mesh
from tests.ranks import join_ranks, run_ranks, spawn_ranks


def communicate(mesh: Mesh) -> list[Entry]:
    """One of each kind; what they left in the log."""
    before = flight_log.count
    axis, rank = mesh.world, mesh.rank
    all_reduce(torch.zeros(3, 2), axis)
    start_reduce_scatter(torch.zeros(2), torch.zeros(4), axis).wait()
    start_all_gather(torch.zeros(4, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16), axis).wait()
    if rank == 0:
        start_send(torch.zeros(5), 1, axis, 7).wait()
    else:
        start_receive(torch.zeros(5), 0, axis, 7).wait()
    gather_json({"a": 1}, axis, mesh.device)
    return flight_log.entries()[before - flight_log.count :]


def test_every_kind_of_communication_is_noted() -> None:
    logs = run_ranks(communicate, 2)
    first = logs[0][0].number
    told = [(e.op, e.number - first, e.ranks, e.bytes, e.dtype, e.shape) for e in logs[0]]
    assert told[:3] == [
        ("all_reduce", 0, (0, 1), 24, "float32", (3, 2)),
        ("reduce_scatter", 1, (0, 1), 16, "float32", (4,)),
        ("all_gather", 2, (0, 1), 8, "bfloat16", (4,)),
    ]
    assert [(e.op, e.ranks, e.bytes) for e in (logs[0][3], logs[1][3])] == [
        ("send", (0, 1), 20),
        ("receive", (0, 1), 20),
    ]
    assert len(logs[0]) == 6  # the last two are the gather's
    assert [e.what for e in logs[0]] == [e.what for e in logs[1]]
    assert all(0 < e.begun <= e.ended for log in logs for e in log)
    assert {e.group for e in logs[0]} == {"world"}


def names(mesh: Mesh) -> tuple[str, tuple[int, ...]]:
    """The group of a tensor-parallel all-reduce, and its ranks."""
    all_reduce(torch.zeros(1), build_mesh(shape=MeshShape(tp=2)).tp)
    last = flight_log.entries()[-1]
    return last.group, last.ranks


def test_groups_are_named_by_their_axis() -> None:
    assert run_ranks(names, 4) == [("tp", (0, 1)), ("tp", (0, 1)), ("tp", (2, 3)), ("tp", (2, 3))]


def recorded_events(mesh: Mesh) -> tuple[int, float, int]:
    """With a CUDA device timed: events after talk over `saving`, the wait counted, events after more."""
    with (
        mock.patch.object(flight_log, "_stalls", deque()),
        mock.patch.object(flight, "_recorded_event") as record,
    ):
        flight_log.take_waited_s()
        gather_json(1, mesh.saving, torch.device("cpu"))
        in_background, waited_s = record.call_count, flight_log.take_waited_s()
        all_reduce(torch.zeros(1), mesh.world)
        return in_background, waited_s, record.call_count


def test_the_wait_of_a_save_is_no_step_s_and_records_no_event() -> None:
    """Its thread has device 0 current: an event there would make a context, and pair with none of ours."""
    assert run_ranks(recorded_events, 2) == [(0, 0.0, 2)] * 2


def killed_while_waiting(root: str) -> None:
    """Rank 1 does not come to the 301st all-reduce, in which rank 0 is then killed."""
    mesh = build_mesh()
    flight_log.attach(Path(root, f"{mesh.rank}.bin"), {"rank": mesh.rank})
    for _ in range(CAPACITY + 44):
        all_reduce(torch.zeros(2), mesh.world)
    if mesh.rank == 0:
        Path(root, "ready").touch()
        all_reduce(torch.zeros(9), mesh.world)
    time.sleep(60)


def test_the_log_outlives_its_process(tmp_path: Path) -> None:
    processes = spawn_ranks(killed_while_waiting, 2, str(tmp_path))
    limit = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < limit:
        time.sleep(0.01)
    while read_flight_file(tmp_path / "0.bin")[1][-1].ended != AWAITED and time.monotonic() < limit:
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid or 0, signal.SIGKILL)
    assert join_ranks(processes) == [-9, -9]
    for rank, last in ((0, CAPACITY + 45), (1, CAPACITY + 44)):
        who, entries = read_flight_file(tmp_path / f"{rank}.bin")
        assert who["rank"] == rank
        assert [entry.number for entry in entries] == list(range(last - CAPACITY + 1, last + 1))


def test_what_is_no_flight_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"megalite")
    with pytest.raises(ValueError, match="not a flight log"):
        read_flight_file(tmp_path / "x")


def test_a_log_without_a_file_goes_on_in_memory(tmp_path: Path) -> None:
    log = FlightLog()
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(OSError, match="folder"):
        log.attach(tmp_path / "folder/x.bin", {"rank": 0})
    log.attach(tmp_path / "x.bin", {"rank": 0})
    log.detach(keeps_file=False)
    assert not (tmp_path / "x.bin").exists()
    assert log.entries() == []
