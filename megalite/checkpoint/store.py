"""Checkpoints in a run's folder: committed together by all ranks, chosen together, read at any layout.

    run_dir/checkpoints/
      step_00000100/          whole: only a rename puts it here
      step_00000200.tmp/      being written, or left by a kill; never read
      step_00000200.old/      what a new step_00000200 replaces; read if the kill came between the renames
      step_00000050.trash/    being deleted, or left by a kill; never read

Two promises. At every instant, a kill or a power cut leaves a folder in which `newest` finds the last
committed checkpoint or the one about to be. And a run folder holds one history: a run that went back
and commits step 200 removes steps 300 and 400 of the future it left, so that newest *by step* is always
the last one committed.

A failure on one rank is told to all before anyone goes on, so all raise the same error and none waits.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megalite.checkpoint.format import (
    MANIFEST,
    FileEntry,
    Manifest,
    SliceEntry,
    TensorSlice,
    encode_manifest,
    explain,
    file_header,
    open_plain,
    read_exactly,
    read_manifest,
    verify_file,
    write_file,
)
from megalite.errors import CheckpointError
from megalite.parallel.collectives import gather_json
from megalite.parallel.mesh import Axis, Mesh

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_([0-9]{8,18})(\.old)?")
_LEFTOVER = re.compile(r"step_[0-9]{8,18}(\.old)?(\.tmp|\.trash)")
_REMEDIES = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "free some space, lower checkpoint.keep_last or move run_dir",
    ),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "make the folder writable for this user or move run_dir"
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint, readable tensor by tensor.

    `refused` holds one line for each newer checkpoint that did not verify.
    """

    folder: Path
    manifest: Manifest
    refused: tuple[str, ...] = ()
    _index: dict[tuple[str, str], list[tuple[SliceEntry, str, int]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        index: dict[tuple[str, str], list[tuple[SliceEntry, str, int]]] = {}
        for file in self.manifest.files:
            offset = len(file_header(file.slices))
            for part in file.slices:
                index.setdefault((part.kind, part.name), []).append((part, file.name, offset))
                offset += part.bytes
        for parts in index.values():
            parts.sort(key=lambda place: place[0].start)
        object.__setattr__(self, "_index", index)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def position(self) -> int:
        """Samples consumed."""
        return self.manifest.position

    @property
    def meta(self) -> dict[str, Any]:
        """What the trainer stored beside the tensors."""
        return self.manifest.meta

    def names(self, kind: str = "weight") -> list[str]:
        """Logical parameters stored with this kind, in stored order."""
        return [name for stored, name in self._index if stored == kind]

    def shape(self, name: str, kind: str = "weight") -> tuple[int, ...]:
        """Logical shape of a parameter.

        Raises:  CheckpointError if it is not stored
        """
        return self._parts(kind, name)[0][0].shape

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A flat row-major range of a logical tensor, whoever wrote it; reads only the bytes it needs.

        Shapes:  returns [stop - start], fp32, CPU; stop=None means to the end
        Raises:  CheckpointError if the tensor is not stored, the range is outside it, or a read fails
        """
        parts = self._parts(kind, name)
        size = parts[-1][0].stop
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise CheckpointError(f"{kind} {name} has {size} elements; [{start}, {stop}) is outside")
        values = torch.empty(stop - start)
        if start == stop:
            return values
        buffer = values.numpy().data.cast("B")
        first = bisect_right(parts, start, key=lambda place: place[0].start) - 1
        for part, file_name, offset in parts[first:]:
            low, high = max(start, part.start), min(stop, part.stop)
            if low >= high:
                break
            with open_plain(self.folder / file_name) as file:
                target = buffer[(low - start) * 4 : (high - start) * 4]
                read_exactly(file, target, offset + (low - part.start) * 4)
        return values

    def check_model(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the parameters stored with a model's.

        Raises:  CheckpointError naming the first that is missing, too many or of another shape
        """
        found = {name: tuple(self.shape(name)) for name in self.names("weight")}
        if found != expected:
            name = next(n for n in {**expected, **found} if expected.get(n) != found.get(n))
            raise CheckpointError(
                f"{self.folder} holds {name} of shape {found.get(name)}, the config's model has "
                f"{expected.get(name)}; continue with the config it was trained with, or another run_dir"
            )

    def verify(self) -> None:
        """Read every byte once and compare it with the manifest's CRCs.

        Raises:  CheckpointError naming the file and slice that differ
        """
        for file in self.manifest.files:
            verify_file(self.folder, file)

    def _parts(self, kind: str, name: str) -> list[tuple[SliceEntry, str, int]]:
        try:
            return self._index[kind, name]
        except KeyError:
            known = self.names(kind)
            hint = f"it has {len(known)}, such as {known[0]}" if known else f"it has no {kind} at all"
            raise CheckpointError(f"{self.folder} has no {kind} {name}; {hint}") from None


def save(
    root: Path,
    step: int,
    position: int,
    slices: Iterable[TensorSlice],
    meta: dict[str, Any],
    mesh: Mesh,
    keep_last: int,
) -> Path:
    """Commit one checkpoint to `root` (a run's checkpoints folder) and delete the oldest.

    Every rank of the mesh calls it with the slices it owns (none is fine; empty ones are dropped);
    step, position, meta and keep_last are rank 0's. When it returns, `newest` finds this checkpoint: one
    of the same step is replaced, for what a caller holds now is the truth, and later steps, which belong
    to a future the run went back from, are removed. Of this step and before, `keep_last` are kept.

    Comm:    three gathers of small JSON over the world
    Raises:  CheckpointError, the same on all ranks, if any rank fails; older checkpoints stay as they
             were and nothing half-written stays behind. If a rank dies, the collective's own error
    """
    if keep_last < 1:
        raise CheckpointError(f"checkpoint.keep_last={keep_last}; keep at least 1")
    target = root / step_name(step)
    staging = root / f"{target.name}.tmp"

    def write() -> str | None:
        owned = [part for part in slices if part.start != part.stop]
        if not owned:
            return None
        return write_file(staging / f"rank_{mesh.rank:05d}.safetensors", owned).model_dump_json()

    def commit(written: list[str | None]) -> None:
        files = tuple(FileEntry.model_validate_json(text) for text in written if text)
        manifest = Manifest(step=step, position=position, world={"size": mesh.size}, meta=meta, files=files)
        _commit(target, staging, encode_manifest(manifest))

    try:
        _together(mesh, lambda: _prepare(staging) if mesh.rank == 0 else None, root)
        written = _together(mesh, write, root)
        _together(mesh, lambda: commit(written) if mesh.rank == 0 else None, root)
    except CheckpointError as error:
        if mesh.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"cannot save {target}: {error}; older checkpoints are intact") from error
    if mesh.rank == 0:
        _retain(root, keep_last)
    return target


def newest(root: Path, mesh: Mesh, before: int | None = None) -> Checkpoint | None:
    """The newest checkpoint by step in `root` that verifies, the same on every rank; None if there is none.

    With `before`, of those at or before that step. The files are shared out among the ranks for
    verification. A checkpoint that does not verify is passed over, with a warning from rank 0 and a line
    in `refused`.

    Comm:    one gather of small JSON over the world, and one per checkpoint tried
    Raises:  CheckpointError, the same on all ranks, if there are checkpoints but none verifies
    """
    names = _together(mesh, lambda: _candidates(root) if mesh.rank == 0 else None, root)[0]
    names = [name for name in names if before is None or _step_of(name) <= before]
    refused: list[str] = []
    for name in names:
        try:
            manifest = _verify_together(root / name, mesh)
        except CheckpointError as error:
            refused.append(f"checkpoint {name} refused: {error}")
            if mesh.rank == 0:
                logger.warning("%s", refused[-1])
        else:
            return Checkpoint(root / name, manifest, tuple(refused))
    if refused:
        raise CheckpointError(
            f"none of the {len(refused)} checkpoints in {root} verifies; {refused[0]}; restore one from a "
            "copy, or move the folder away to start from the beginning"
        )
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open and verify a checkpoint for one process, without communication.

    `path` is a checkpoint, or a run folder or its checkpoints folder, of which the newest that verifies
    is taken.

    Raises:  CheckpointError if there is none, or none that verifies
    """
    if (path / MANIFEST).exists():
        checkpoint = Checkpoint(path, read_manifest(path / MANIFEST))
        checkpoint.verify()
        return checkpoint
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not root.is_dir():
        raise CheckpointError(f"no folder {path}; give a run folder or a checkpoint in it")
    found = newest(root, Mesh(rank=0, size=1, dp=Axis(), device=torch.device("cpu")))
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint; give a run folder or a checkpoint in it")
    return found


def step_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step_{step:08d}"


def _candidates(root: Path) -> list[str]:
    """Names of the folders that may be checkpoints, newest step first, a replaced one after its heir."""
    if not root.exists():
        return []
    found = [match for name in os.listdir(root) if (match := _NAME.fullmatch(name))]
    found.sort(key=lambda match: (-int(match[1]), match[2] is not None))
    return [match[0] for match in found]


def _step_of(name: str) -> int:
    return int(name.split("_")[1].split(".")[0])


def _verify_together(folder: Path, mesh: Mesh) -> Manifest:
    """Each rank reads the manifest and verifies its share of the files.

    Raises:  CheckpointError, the same on all ranks
    """
    manifests: list[Manifest] = []

    def verify_share() -> int:
        if folder.is_symlink():
            raise CheckpointError(f"{folder} is a symbolic link; put the folder itself there")
        manifest = read_manifest(folder / MANIFEST)
        if manifest.step != _step_of(folder.name):
            raise CheckpointError(f"{folder} holds step {manifest.step}; its name says otherwise")
        for file in manifest.files[mesh.rank :: mesh.size]:
            verify_file(folder, file)
        manifests.append(manifest)
        return zlib.crc32(encode_manifest(manifest))

    digests = _together(mesh, verify_share, folder)
    if len(set(digests)) > 1:
        raise CheckpointError(f"ranks read different manifests in {folder}; put run_dir on shared storage")
    return manifests[0]


def _together(mesh: Mesh, action: Callable[[], Any], root: Path) -> list[Any]:
    """Run `action` on every rank; then every rank has every JSON-able result, or all raise alike.

    Raises:  CheckpointError that names the ranks that failed and why
    """
    value, failure, cause = None, None, None
    try:
        value = action()
    except Exception as error:  # whatever it was, the other ranks are waiting to hear of it
        failure, cause = _explain(error, root), error
    outcomes = gather_json([value, failure], mesh.world, mesh.device)
    failures = {rank: text for rank, (_, text) in enumerate(outcomes) if text}
    if not failures:
        return [value for value, _ in outcomes]
    rank, text = next(iter(failures.items()))
    where = f"rank {rank}: " if mesh.size > 1 else ""
    more = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
    raise CheckpointError(f"{where}{text}{more}") from cause


def _explain(error: Exception, root: Path) -> str:
    """One line: what went wrong, where, what would help."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, ValidationError):
        return explain(error)
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}".splitlines()[0]
    code = errno.errorcode.get(error.errno or 0, "")
    place = f" at {error.filename}" if error.filename else ""
    there = next((folder for folder in (root, *root.parents) if folder.is_dir()), Path("/"))
    free = shutil.disk_usage(there).free
    remedy = _REMEDIES.get(error.errno or 0, "check the storage")
    return f"{error.strerror} ({code}){place}, {free:,} bytes free; {remedy}"


def _prepare(staging: Path) -> None:
    """An empty folder to write into; a kill may have left one of the same name."""
    if staging.exists():
        shutil.rmtree(staging)
    if not staging.parent.exists():
        staging.parent.mkdir(parents=True)
        _fsync_folder(staging.parent.parent)
    staging.mkdir()


def _commit(target: Path, staging: Path, manifest: bytes) -> None:
    """Make the files in `staging` the checkpoint `target`, by one rename."""
    with open(staging / MANIFEST, "xb") as file:
        file.write(manifest)
        file.flush()
        os.fsync(file.fileno())
    _fsync_folder(staging)
    for name in _candidates(target.parent):
        if _step_of(name) > _step_of(target.name):
            _discard(target.parent / name)
    if target.exists():
        replaced = target.with_name(f"{target.name}.old")
        if replaced.exists():
            _discard(replaced)
        target.rename(replaced)
    staging.rename(target)
    _fsync_folder(target.parent)


def _retain(root: Path, keep_last: int) -> None:
    """Delete what the last commit made superfluous; failing to is worth a warning, not the run."""
    try:
        names = _candidates(root)
        kept = [name for name in names if not name.endswith(".old")][:keep_last]
        for name in set(names) - set(kept):
            _discard(root / name)
        for name in os.listdir(root):
            if _LEFTOVER.fullmatch(name):
                shutil.rmtree(root / name)
    except OSError as error:
        logger.warning("old checkpoints stay behind: %s", _explain(error, root))


def _discard(folder: Path) -> None:
    """Delete a checkpoint; the rename comes first, so that a kill leaves no half of one under its name."""
    trash = folder.with_name(f"{folder.name}.trash")
    if trash.exists():
        shutil.rmtree(trash)
    folder.rename(trash)
    shutil.rmtree(trash)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
