"""Collectives give what they say, and a lost peer is one kind of error, however a backend words it."""

from __future__ import annotations

import os
import signal
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from megalite.parallel.collectives import (
    PeerError,
    Pending,
    all_reduce,
    gather_json,
    start_all_gather,
    start_receive,
    start_reduce_scatter,
    start_send,
)
from megalite.parallel.flight import Place
from megalite.parallel.mesh import Axis, Mesh, build_mesh
from tests.ranks import join_ranks, run_ranks, spawn_ranks


class _Broken:
    """A transfer that ends in an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def wait(self) -> None:
        raise self.error


def _wait_for(error: Exception) -> None:
    Pending([cast(dist.Work, _Broken(error))], Place(0, is_timed=False)).wait()


def test_every_wording_of_a_lost_peer_is_recognised() -> None:
    with pytest.raises(PeerError, match="pair closure") as caught:  # gloo's, of what follows a timeout
        _wait_for(RuntimeError("Application timeout caused pair closure"))
    assert isinstance(caught.value, dist.DistError)  # what the command line ends with 76 for


@pytest.mark.parametrize("kind", [torch.AcceleratorError, torch.OutOfMemoryError])
def test_a_fault_of_the_own_device_is_no_lost_peer(kind: type[RuntimeError]) -> None:
    with pytest.raises(kind, match="an illegal memory access"):
        _wait_for(kind("CUDA error: an illegal memory access was encountered"))


def _call(kind: str, axis: Axis) -> None:
    if kind == "all_reduce":
        all_reduce(torch.ones(1), axis)
    elif kind == "reduce_scatter":
        start_reduce_scatter(torch.empty(1), torch.ones(axis.size), axis).wait()
    else:
        start_all_gather(torch.empty(axis.size), torch.ones(1), axis).wait()


def _outlive(kind: str) -> None:
    mesh = build_mesh()
    _call(kind, mesh.world)
    if mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        _call(kind, mesh.world)
    except PeerError:
        os._exit(5)


@pytest.mark.parametrize("kind", ["all_reduce", "reduce_scatter", "all_gather"])
def test_a_killed_peer_is_a_lost_peer(kind: str) -> None:
    assert join_ranks(spawn_ranks(_outlive, 2, kind, comm_timeout_s=10)) == [5, -signal.SIGKILL]


def _scatter_and_gather(mesh: Mesh, dtype: torch.dtype, rounds: int) -> None:
    """Several under way at once, and messages between the same ranks beside them, waited for out of order."""
    n, r = mesh.size, mesh.rank
    values = torch.arange(rounds * n * n * 5).view(rounds, n, n, 5) % 97 - 48  # [round, sender, part, place]
    wanted = values.sum(1)
    before, after = (r - 1) % n, (r + 1) % n
    under_way = []
    for number in range(rounds):
        part, whole = torch.full((5,), torch.nan, dtype=dtype), torch.full((n, 5), torch.nan, dtype=dtype)
        message = torch.full((5,), -1, dtype=torch.int64)
        summed = start_reduce_scatter(part, values[number, r].to(dtype).flatten(), mesh.world)
        sent = start_send(values[number, r, after], after, mesh.world, tag=number)
        received = start_receive(message, before, mesh.world, tag=number)
        gathered = start_all_gather(whole.flatten(), values[number, r, r].to(dtype), mesh.world)
        under_way.append((part, whole, message, (gathered, received, summed, sent)))
    for number, (part, whole, message, works) in enumerate(under_way):
        for work in works:
            work.wait()
        assert part.tolist() == wanted[number, r].tolist()
        assert whole.tolist() == values[number].diagonal(dim1=0, dim2=1).T.tolist()
        assert message.tolist() == values[number, before, r].tolist()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_scatter_and_gather(world: int) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        run_ranks(_scatter_and_gather, world, dtype, 3)


def _in_place(mesh: Mesh) -> list[float]:
    whole = torch.full((mesh.size, 3), torch.nan)
    part = whole[mesh.rank]
    part.fill_(mesh.rank)
    start_all_gather(whole.view(-1), part, mesh.world).wait()
    values: list[float] = whole.flatten().tolist()
    return values


def test_a_part_may_lie_where_it_is_gathered() -> None:
    assert run_ranks(_in_place, 3) == [[0.0] * 3 + [1.0] * 3 + [2.0] * 3] * 3


def _gather(mesh: Mesh) -> list[Any]:
    return gather_json({"rank": mesh.rank, "text": "é" * mesh.rank}, mesh.world, mesh.device)


def test_values_of_unequal_length_arrive_whole() -> None:
    expected = [{"rank": rank, "text": "é" * rank} for rank in range(3)]
    assert run_ranks(_gather, 3) == [expected] * 3
