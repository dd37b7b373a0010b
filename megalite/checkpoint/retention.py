"""The folders of a run's checkpoints: their names, which are kept, and how one is deleted.

run_dir/checkpoints/
  step_00000100/          whole: only a rename puts it here
  step_00000200.tmp/      being written, or left by a kill; never read
  step_00000200.old/      what a new step_00000200 replaces; read if the kill came between the renames
  step_00000050.trash/    being deleted, or left by a kill; never read
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megalite.checkpoint.agree import explain_failure
from megalite.checkpoint.format import MANIFEST, read_manifest
from megalite.errors import CheckpointError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_([0-9]{8,18})(\.old)?")
_LEFTOVER = re.compile(r"step_[0-9]{8,18}(\.old)?(\.tmp|\.trash)")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: a checkpoint is deleted when none of the three keeps it.

    The `last` newest; those at multiples of `every` steps; the `best` of lowest validation loss, of those
    saved at a step that was validated (of equals the newer).
    """

    last: int = 1
    every: int = 0
    best: int = 0

    def __post_init__(self) -> None:
        if self.last < 1:
            raise CheckpointError(f"checkpoint.keep_last={self.last}; keep at least 1")


def step_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """The step in a folder's name."""
    return int(name.split("_")[1].split(".")[0])


def candidates(root: Path) -> list[str]:
    """Names of the folders that may be checkpoints, newest step first, a replaced one after its heir."""
    if not root.exists():
        return []
    found = [match for name in os.listdir(root) if (match := _NAME.fullmatch(name))]
    found.sort(key=lambda match: (-int(match[1]), match[2] is not None))
    return [match[0] for match in found]


def retain(root: Path, keep: Retention) -> None:
    """Delete what the last commit made superfluous; failing to is worth a warning, not the run."""
    try:
        names = candidates(root)
        for name in set(names) - _kept(root, [name for name in names if not name.endswith(".old")], keep):
            discard(root / name)
        for name in os.listdir(root):
            if _LEFTOVER.fullmatch(name):
                shutil.rmtree(root / name)
    except OSError as error:
        logger.warning("old checkpoints stay behind: %s", explain_failure(error, root))


def discard(folder: Path) -> None:
    """Delete a checkpoint; the rename comes first, and reaches the disk first, so that neither a kill nor a
    power cut leaves half of one under its name."""
    trash = folder.with_name(f"{folder.name}.trash")
    if trash.exists():
        shutil.rmtree(trash)
    folder.rename(trash)
    fsync_folder(folder.parent)
    shutil.rmtree(trash)


def fsync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _kept(root: Path, names: list[str], keep: Retention) -> set[str]:
    """Of whole checkpoints, newest first, those that stay."""
    kept = set(names[: keep.last])
    if keep.every:
        kept |= {name for name in names if step_of(name) % keep.every == 0}
    if keep.best:
        losses = {name: _validation_loss(root / name) for name in names}
        kept |= set(sorted((n for n in names if losses[n] < math.inf), key=losses.__getitem__)[: keep.best])
    return kept


def _validation_loss(folder: Path) -> float:
    """The validation loss stored with a checkpoint; infinite where there is none to compare."""
    try:
        loss = read_manifest(folder / MANIFEST).meta.get("val_loss")
    except CheckpointError:
        return math.inf
    return float(loss) if isinstance(loss, float) and math.isfinite(loss) else math.inf
