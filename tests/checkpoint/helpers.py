"""A small model's state as a function of (step, version), cut among ranks at odd places."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint.commit import save
from megalite.checkpoint.format import TensorSlice
from megalite.checkpoint.retention import Retention
from megalite.checkpoint.store import Checkpoint
from megalite.parallel.mesh import Mesh

KINDS = ("weight", "exp_avg", "exp_avg_sq")
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (11, 5),
    "blocks.0.norm.weight": (5,),
    "blocks.0.mlp.weight": (3, 4, 5),
    "scale": (),
}
TOTAL = sum(math.prod(shape) for shape in SHAPES.values())


def values(kind: str, name: str, step: int, version: int = 0) -> Tensor:
    """The logical tensor, flat."""
    seed = zlib.crc32(f"{kind} {name} {step} {version}".encode())
    return torch.randn(math.prod(SHAPES[name]), generator=torch.Generator().manual_seed(seed))


def owned(rank: int, world: int, step: int, version: int = 0) -> list[TensorSlice]:
    """What a rank owns under ZeRO-1: one range of each kind's concatenation, cut between any two elements."""
    bounds = [0, *(TOTAL * (r + 1) // (world + 1) + 3 * r for r in range(world - 1)), TOTAL]
    low, high = bounds[rank], bounds[rank + 1]
    slices, base = [], 0
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        start, stop = max(low - base, 0), min(high - base, size)
        if start < stop:
            for kind in KINDS:
                part = values(kind, name, step, version)[start:stop]
                slices.append(TensorSlice(kind, name, shape, start, stop, part))
        base += size
    return slices


def save_step(mesh: Mesh, root: str | Path, step: int, version: int = 0, keep_last: int = 2) -> str:
    """Save the state of (step, version) from this rank; the committed folder's name."""
    slices = owned(mesh.rank, mesh.size, step, version)
    meta, keep = {"version": version}, Retention(keep_last)
    return save(Path(root), step, 10 * step, lambda: slices, meta, mesh, keep).name


def check(checkpoint: Checkpoint, step: int | None = None) -> None:
    """The checkpoint holds exactly the state its step and version stand for."""
    assert step is None or checkpoint.step == step
    assert checkpoint.position == 10 * checkpoint.step
    for kind in KINDS:
        assert set(checkpoint.names(kind)) == set(SHAPES)
        for name, shape in SHAPES.items():
            expected = values(kind, name, checkpoint.step, checkpoint.meta["version"])
            assert checkpoint.shape(name, kind) == shape
            assert torch.equal(checkpoint.read(kind, name), expected)
