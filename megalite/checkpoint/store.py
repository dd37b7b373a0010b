"""Checkpoints in a run's folder, read: chosen together by all ranks, at any layout.

`newest` takes the newest *by step* that verifies and is of no future that the run has left, as its ledger
tells: always the last one committed, or after a rollback the last before it. See `commit`.
"""

from __future__ import annotations

import logging
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.agree import everywhere
from megalite.checkpoint.format import (
    MANIFEST,
    Manifest,
    SliceEntry,
    encode_manifest,
    file_header,
    open_plain,
    read_exactly,
    read_manifest,
    verify_file,
)
from megalite.checkpoint.history import Rollback, abandoned_from, known_rollbacks, read_ledger
from megalite.checkpoint.retention import candidates, step_of
from megalite.errors import CheckpointError
from megalite.parallel.mesh import Axis, Mesh

logger = logging.getLogger(__name__)


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
            held = f"of shape {found[name]}" if name in found else "not at all"
            wanted = f"of shape {expected[name]}" if name in expected else "not at all"
            raise CheckpointError(
                f"{self.folder} holds {name} {held}, the config's model has it {wanted}; continue with the "
                "config it was trained with, or another run_dir"
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


def newest(
    root: Path,
    mesh: Mesh,
    before: int | None = None,
    after: int = -1,
    ledger: Sequence[Rollback] = (),
) -> Checkpoint | None:
    """The newest checkpoint by step in `root` that verifies, the same on every rank; None if there is none.

    With `before`, of those at or before that step; with `after`, of later ones than that; with `ledger`, of
    those that are of no future which these rollbacks left. The files are shared out among the ranks for
    verification. A checkpoint that does not verify is passed over, with a warning from rank 0 and a line
    in `refused`.

    Comm:    one gather of small JSON over the world, and one per checkpoint tried
    Raises:  CheckpointError, the same on all ranks, if there are checkpoints but none verifies
    """
    names = everywhere(mesh.world, mesh.device, lambda: candidates(root) if mesh.rank == 0 else None, root)[0]
    limit = max(map(step_of, names), default=0) if before is None else before
    refused: list[str] = []
    for name in names:
        if not after < step_of(name) <= limit:
            continue
        try:
            manifest = _verify_together(root / name, mesh)
            left = abandoned_from(ledger, known_rollbacks(manifest.meta, root / name)) if ledger else None
        except CheckpointError as error:
            refused.append(f"checkpoint {name} refused: {error}")
            if mesh.rank == 0:
                logger.warning("%s", refused[-1])
            continue
        if left is None or manifest.step <= left:
            return Checkpoint(root / name, manifest, tuple(refused))
        # Of the steps after `left` one may know more: it was committed, and a kill left this one.
        limit, refused = manifest.step - 1, []
    if refused:
        raise CheckpointError(
            f"none of the {len(refused)} checkpoints in {root} verifies; {refused[0]}; restore one from a "
            "copy, or move the folder away to start from the beginning"
        )
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open and verify a checkpoint for one process, without communication.

    `path` is a checkpoint, or a run folder or its checkpoints folder, of which that is taken from which the
    run would go on.

    Raises:  CheckpointError if there is none, or none that verifies
    """
    if (path / MANIFEST).exists():
        checkpoint = Checkpoint(path, read_manifest(path / MANIFEST))
        checkpoint.verify()
        return checkpoint
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not root.is_dir():
        raise CheckpointError(f"no folder {path}; give a run folder or a checkpoint in it")
    names = candidates(root)
    alone = Mesh(rank=0, size=1, dp=Axis(), device=torch.device("cpu"))
    ledger = read_ledger(root.parent, alone)
    try:
        found = newest(root, alone, ledger=ledger)
    except CheckpointError:
        if candidates(root) == names:
            raise
        return open_checkpoint(path)  # a run at work has put newer ones in their place meanwhile
    if found is None and names:
        raise CheckpointError(
            f"{path} holds only checkpoints of a future that the run went back from, {names[0]} the newest; "
            "wait for its next save, or give one of them"
        )
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint; give a run folder or a checkpoint in it")
    return found


def _verify_together(folder: Path, mesh: Mesh) -> Manifest:
    """Each rank reads the manifest and verifies its share of the files.

    Raises:  CheckpointError, the same on all ranks
    """
    manifests: list[Manifest] = []

    def verify_share() -> int:
        if folder.is_symlink():
            raise CheckpointError(f"{folder} is a symbolic link; put the folder itself there")
        manifest = read_manifest(folder / MANIFEST)
        if manifest.step != step_of(folder.name):
            raise CheckpointError(f"{folder} holds step {manifest.step}; its name says otherwise")
        for file in manifest.files[mesh.rank :: mesh.size]:
            verify_file(folder, file)
        manifests.append(manifest)
        return zlib.crc32(encode_manifest(manifest))

    digests = everywhere(mesh.world, mesh.device, verify_share, folder)
    if len(set(digests)) > 1:
        raise CheckpointError(f"ranks read different manifests in {folder}; put run_dir on shared storage")
    return manifests[0]
