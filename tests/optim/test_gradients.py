"""Gradients in the flat buffers: whatever arrives in whatever order, the shard holds the sums over ranks."""

from __future__ import annotations

import random
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megalite.optim.buckets import lay_out
from megalite.optim.gradients import Gradients
from megalite.parallel.mesh import ALONE, Axis, Mesh, MeshShape, build_mesh
from megalite.parallel.sharding import Piece, ShardSpec
from tests.ranks import run_ranks

STEPS = 3

_mesh = cache(build_mesh)


class Arrival(NamedTuple):
    """A parameter's gradient from one micro-batch, on every rank."""

    name: str
    values: list[Tensor]  # of each rank of the world


def _specs(draw: random.Random, tp: Axis) -> dict[str, ShardSpec]:
    """Parameters of every kind: on one rank, copied, computed in shares, summed at the end of a step."""
    shapes = [(draw.randint(3, 9), *draw.choice([(), (4,)])) for _ in range(6)]
    found = {}
    for number, (rows, *columns) in enumerate(shapes):
        cuts = sorted(draw.choices(range(1, rows), k=2))
        bounds = zip((0, *cuts), (*cuts, rows), strict=True)
        kinds = draw.choices(["own", "copy", "share"], k=3) if number < 5 else ["late"] * 3
        pieces = [
            Piece(low, high, ALONE if kind == "own" else tp, kind in ("share", "late"), kind == "late")
            for kind, (low, high) in zip(kinds, bounds, strict=True)
        ]
        found[f"blocks.{number % 2}.{number}"] = ShardSpec((rows, *columns), tuple(pieces))
    return found


def _arrivals(draw: random.Random, specs: dict[str, ShardSpec], micro_batches: int) -> list[Arrival]:
    """Of a step, in the order in which they come; some parameters go unused in some micro-batches, or all."""
    unused = set(draw.sample(list(specs), draw.choice([0, 1, 3])))
    found = []
    for _ in range(micro_batches):
        for name in draw.sample(list(specs), len(specs)):
            if name not in unused and draw.random() < 0.8:
                shape = specs[name].shape
                # Each is exact in bf16, most of their sums are not.
                seeds = [torch.Generator().manual_seed(draw.randrange(10**6)) for _ in range(4)]
                values = [torch.randint(-255, 256, shape, generator=seed).bfloat16() for seed in seeds]
                found.append(Arrival(name, values))
    return found


def _check(mesh: Mesh, seed: int) -> None:
    draw = random.Random(seed)
    mesh = _mesh(shape=MeshShape(tp=draw.choice([1, 2]), zero_shard_size=draw.choice([1, 2])))
    specs = _specs(draw, mesh.tp)
    shard, replicas = draw.choice([(ALONE, mesh.dp), (mesh.shard, mesh.replicas)])
    layout = lay_out(specs, draw.choice([1, 40, 1000]), shard, by_unit=draw.choice([False, True]))
    gradients = Gradients(layout, replicas, draw.choice([False, True]), mesh.device)
    parameters = {name: nn.Parameter(torch.zeros(spec.shape).bfloat16()) for name, spec in specs.items()}
    for _ in range(STEPS):
        micro_batches = draw.choice([1, 2, 4])
        arrivals = _arrivals(draw, specs, micro_batches)
        gradients.begin_step(micro_batches)
        for name, values in arrivals:
            parameters[name].grad = values[mesh.rank].clone()
            gradients.collect(parameters[name], name)
            assert parameters[name].grad is None
        gradients.finish_step()
        peers = range(mesh.tp.rank, mesh.size, mesh.tp.size)  # data-parallel
        for owned in layout.owned_ranges():
            (piece,) = {part.piece for part in specs[owned.name].ranges(owned.start, owned.stop)}
            ranks = range(mesh.size) if piece.is_partial and piece.copies.size > 1 else peers
            wanted = torch.zeros(owned.stop - owned.start)
            for name, values in arrivals:
                if name == owned.name:
                    wanted += sum(values[rank].float().flatten()[owned.start : owned.stop] for rank in ranks)
            assert torch.equal(gradients.shard_values[owned.shard], wanted), (owned.name, micro_batches)


def _check_all(mesh: Mesh) -> None:
    for seed in range(24):
        _check(mesh, seed)


def test_the_shard_holds_the_sums_over_all_ranks_and_micro_batches() -> None:
    run_ranks(_check_all, 4)
