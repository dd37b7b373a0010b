"""A lost peer is one kind of error, however a backend words it."""

from __future__ import annotations

import os
import signal
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from megalite.parallel.collectives import PeerError, Pending, all_reduce, gather_json
from megalite.parallel.mesh import Mesh, build_mesh
from tests.ranks import join_ranks, run_ranks, spawn_ranks


class _Broken:
    """A transfer that ends as gloo ends the ones that follow a timeout."""

    def wait(self) -> None:
        raise RuntimeError("Application timeout caused pair closure")


def test_every_wording_of_a_lost_peer_is_recognised() -> None:
    with pytest.raises(PeerError, match="pair closure") as caught:
        Pending(cast(dist.Work, _Broken()), 0).wait()
    assert isinstance(caught.value, dist.DistError)  # what the command line ends with 76 for


def _outlive() -> None:
    mesh = build_mesh()
    all_reduce(torch.ones(1), mesh.world)
    if mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        all_reduce(torch.ones(1), mesh.world)
    except PeerError:
        os._exit(5)


def test_a_killed_peer_is_a_lost_peer() -> None:
    assert join_ranks(spawn_ranks(_outlive, 2, comm_timeout_s=10)) == [5, -signal.SIGKILL]


def _gather(mesh: Mesh) -> list[Any]:
    return gather_json({"rank": mesh.rank, "text": "é" * mesh.rank}, mesh.world, mesh.device)


def test_values_of_unequal_length_arrive_whole() -> None:
    expected = [{"rank": rank, "text": "é" * rank} for rank in range(3)]
    assert run_ranks(_gather, 3) == [expected] * 3
