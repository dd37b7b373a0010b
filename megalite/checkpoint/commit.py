"""Committing a checkpoint: written by all ranks together, made visible by one rename.

Two promises. At every instant, a kill or a power cut leaves a folder in which `store.newest` finds the last
committed checkpoint or the one about to be. And a run folder holds one history: a run that went back
and commits step 200 removes steps 300 and 400 of the future it left, so that newest *by step* is then
the last one committed. (If it is killed in between, its ledger tells which they are: `recovery`.)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.agree import everywhere
from megalite.checkpoint.format import (
    MANIFEST,
    FileEntry,
    Manifest,
    TensorSlice,
    encode_manifest,
    write_file,
)
from megalite.checkpoint.retention import (
    Retention,
    candidates,
    discard,
    fsync_folder,
    retain,
    step_name,
    step_of,
)
from megalite.errors import CheckpointError
from megalite.parallel.mesh import Mesh

_CPU = torch.device("cpu")


def save(
    root: Path,
    step: int,
    position: int,
    slices: Callable[[], Iterable[TensorSlice]],
    meta: dict[str, Any],
    mesh: Mesh,
    keep: Retention,
    verify: Callable[[], None] = lambda: None,
) -> Path:
    """Commit one checkpoint to `root` (a run's checkpoints folder) and delete the oldest.

    Every rank of the mesh calls it; `slices` gives those it owns (none is fine; empty ones are dropped);
    step, position, meta and keep are rank 0's. When it returns, `newest` finds this checkpoint: one
    of the same step is replaced, for what a caller holds now is the truth, and later steps, which belong
    to a future the run went back from, are removed. `verify` is called once the slices are written, and
    raises if they may not be what they were meant to be.

    Comm:    three gathers of small JSON over `mesh.saving`
    Raises:  CheckpointError, the same on all ranks, if any rank fails; older checkpoints stay as they
             were and nothing half-written stays behind. If a rank dies, the collective's own error
    """
    target = root / step_name(step)
    staging = root / f"{target.name}.tmp"

    def write() -> str | None:
        owned = [part for part in slices() if part.start != part.stop]
        if not owned:
            return None
        entry = write_file(staging / f"rank_{mesh.rank:05d}.safetensors", owned)
        verify()
        return entry.model_dump_json()

    def commit(written: list[str | None]) -> None:
        files = tuple(FileEntry.model_validate_json(text) for text in written if text)
        manifest = Manifest(step=step, position=position, world={"size": mesh.size}, meta=meta, files=files)
        _commit(target, staging, encode_manifest(manifest))

    try:
        everywhere(mesh.saving, _CPU, lambda: _prepare(staging) if mesh.rank == 0 else None, root)
        written = everywhere(mesh.saving, _CPU, write, root)
        everywhere(mesh.saving, _CPU, lambda: commit(written) if mesh.rank == 0 else None, root)
    except CheckpointError as error:
        if mesh.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"cannot save {target}: {error}; older checkpoints are intact") from error
    if mesh.rank == 0:
        retain(root, keep)
    return target


def _prepare(staging: Path) -> None:
    """An empty folder to write into; a kill may have left one of the same name."""
    if staging.exists():
        shutil.rmtree(staging)
    root = staging.parent
    if not root.exists():
        root.mkdir(parents=True)
        for folder in (root.parent, root.parent.parent):  # a new run's folder is new as well
            with suppress(PermissionError):  # where the user may not look; he was given his folder there
                fsync_folder(folder)
    staging.mkdir()


def _commit(target: Path, staging: Path, manifest: bytes) -> None:
    """Make the files in `staging` the checkpoint `target`, by one rename."""
    with open(staging / MANIFEST, "xb") as file:
        file.write(manifest)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(staging)
    if target.exists():
        replaced = target.with_name(f"{target.name}.old")
        if replaced.exists():
            discard(replaced)
        target.rename(replaced)
    staging.rename(target)
    fsync_folder(target.parent)
    for name in candidates(target.parent):  # only now, for there may be no earlier one
        if step_of(name) > step_of(target.name):
            discard(target.parent / name)
