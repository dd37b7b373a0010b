"""What is being done to a run's checkpoints when the fault strikes: saving, saving behind, loading."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from megalite.checkpoint.format import TensorSlice
from megalite.checkpoint.snapshots import Snapshot, copy_to_host
from megalite.checkpoint.store import newest
from megalite.checkpoint.writer import Writer
from megalite.log import RunLog
from megalite.parallel.collectives import all_reduce
from megalite.parallel.mesh import Mesh
from tests.checkpoint.helpers import TOTAL, check, owned, save_step
from tests.trainer.runs import tiny


class Held:
    """An engine's state, as `Writer` sees it: this rank's part of (step, version)."""

    def __init__(self, mesh: Mesh, step: int, version: int = 0) -> None:
        self.slices = owned(mesh.rank, mesh.size, step, version)

    def state_slices(self) -> Iterable[TensorSlice]:
        """The slices as they are."""
        return self.slices

    def snapshot(self, reuse: Snapshot | None = None) -> Snapshot:
        """A copy of them."""
        named = [(f"{part.kind} {part.name} {part.start}", part.values) for part in self.slices]
        copies = copy_to_host(named, reuse)
        slices = [
            TensorSlice(part.kind, part.name, part.shape, part.start, part.stop, values)
            for part, values in zip(self.slices, copies.values(), strict=True)
        ]
        return Snapshot(copies, tuple(slices), 0, {})


def open_writer(mesh: Mesh, root: str | Path, *overrides: str) -> tuple[RunLog, Writer]:
    """The log and the writer of a run whose checkpoints lie in `root`."""
    run_dir = Path(root).parent
    run_dir.mkdir(parents=True, exist_ok=True)
    config = tiny(run_dir, f"run_dir={run_dir}", "checkpoint.keep_last=2", *overrides)
    log = RunLog(run_dir, mesh.rank == 0, steps=9, every_steps=9)
    return log, Writer(config, mesh, log, num_parameters=TOTAL)


def save_third(mesh: Mesh, root: str) -> None:
    """Save step 3 while everyone waits."""
    save_step(mesh, root, 3)


def save_third_behind(mesh: Mesh, root: str) -> None:
    """Save step 3 while training goes on, with collectives of its own."""
    log, writer = open_writer(mesh, root)
    with log, writer:
        writer.save(3, 30, {"version": 0}, Held(mesh, 3))
        for _ in range(3):
            all_reduce(torch.ones(8), mesh.world)


def load(mesh: Mesh, root: str) -> None:
    """Find the newest checkpoint and read all of it."""
    found = newest(Path(root), mesh)
    assert found is not None
    check(found, 2)
