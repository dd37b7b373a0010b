"""The harness itself: results in order, failures named, pools rebuilt, cheap once warm."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch

from megalite.parallel.collectives import all_reduce, gather_json
from megalite.parallel.mesh import Mesh, build_mesh, close_mesh
from tests.ranks import RanksError, join_ranks, run_ranks, spawn_ranks


def total(mesh: Mesh, scale: int) -> tuple[int, float]:
    """My rank, and the sum of scaled ranks over the world."""
    return mesh.rank, float(all_reduce(torch.tensor([float(scale * mesh.rank)]), mesh.world))


def fail_on_one(mesh: Mesh) -> None:
    """Rank 1 raises while the others wait for it."""
    if mesh.rank == 1:
        raise ValueError("seven is not a rank")
    gather_json(None, mesh.world, mesh.device)


def die_on_one(mesh: Mesh) -> None:
    """Rank 1 is gone while the others wait for it."""
    if mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    gather_json(None, mesh.world, mesh.device)


def hang_on_one(mesh: Mesh) -> None:
    """Rank 1 never returns."""
    if mesh.rank == 1:
        time.sleep(600)


def exit_with_sum(base: int) -> None:
    """A launched process: joins the group by itself, exits with base + world size."""
    mesh = build_mesh()
    ranks = gather_json(mesh.rank, mesh.world, mesh.device)
    close_mesh(mesh)
    sys.exit(base + len(ranks))


def wait_for_peer() -> None:
    """Rank 0 waits in a collective that rank 1 never enters."""
    mesh = build_mesh()
    if mesh.rank == 1:
        time.sleep(600)
    gather_json(None, mesh.world, mesh.device)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_results_come_in_rank_order(world: int) -> None:
    expected = 10.0 * sum(range(world))
    assert run_ranks(total, world, 10) == [(rank, expected) for rank in range(world)]


def test_warm_ranks_cost_well_under_a_second() -> None:
    run_ranks(total, 2, 1)
    begin = time.perf_counter()
    for _ in range(10):
        run_ranks(total, 2, 1)
    assert (time.perf_counter() - begin) / 10 < 0.25


def test_an_exception_fails_the_test_with_its_traceback_and_the_pool_recovers() -> None:
    with pytest.raises(RanksError, match=r"rank 1: (?s:.)*ValueError: seven is not a rank"):
        run_ranks(fail_on_one, 2)
    assert run_ranks(total, 2, 1) == [(0, 1.0), (1, 1.0)]


def test_a_dead_rank_is_named() -> None:
    with pytest.raises(RanksError, match="rank 1: died with exit code -9"):
        run_ranks(die_on_one, 2)
    assert run_ranks(total, 2, 1) == [(0, 1.0), (1, 1.0)]


def test_a_timeout_names_the_ranks_still_running() -> None:
    with pytest.raises(RanksError, match=r"hang_on_one not finished after 0.3 s: ranks \[1\]"):
        run_ranks(hang_on_one, 2, timeout_s=0.3)


def test_a_function_that_cannot_travel_is_refused_here() -> None:
    with pytest.raises((AttributeError, TypeError), match=r"^Can't (pickle|get) local object .*<lambda>"):
        run_ranks(lambda mesh: mesh.rank, 2)
    assert run_ranks(total, 2, 1) == [(0, 1.0), (1, 1.0)]


def test_spawned_ranks_exit_with_their_own_code() -> None:
    assert join_ranks(spawn_ranks(exit_with_sum, 2, 40)) == [42, 42]


def test_a_spawned_rank_can_be_killed_and_its_peer_notices() -> None:
    processes = spawn_ranks(wait_for_peer, 2)
    time.sleep(0.5)
    os.kill(processes[1].pid or 0, signal.SIGKILL)
    survivor, killed = join_ranks(processes, timeout_s=20)
    assert (killed, survivor) == (-9, 1)


def test_spawned_ranks_that_hang_are_named() -> None:
    processes = spawn_ranks(wait_for_peer, 2)
    with pytest.raises(RanksError, match=r"ranks \[0, 1\]"):
        join_ranks(processes, timeout_s=0.2)
    assert not any(process.is_alive() for process in processes)
