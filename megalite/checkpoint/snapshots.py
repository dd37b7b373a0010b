"""Copies of a run's state in host memory: what a rollback reads first, and what is written behind the step.

A snapshot costs a step the copy and nothing else: its CRCs are taken by another thread, at once. They are
compared before any use, so that a bit that flips in host memory meanwhile is never trained on or saved.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.format import TensorSlice
from megalite.errors import CheckpointError
from megalite.parallel.collectives import gather_json
from megalite.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

_sealer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot-crc")


@dataclass(frozen=True)
class Snapshot:
    """What one rank holds of the model's and the optimizer's state, copied to host memory.

    `slices` are views of `tensors`: this rank's part of a checkpoint, which may be less than it holds.
    """

    tensors: dict[str, Tensor]
    slices: tuple[TensorSlice, ...]
    applied_steps: int
    loss_scale: dict[str, float]
    _crcs: Future[dict[str, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_crcs", _sealer.submit(_crcs_of, self.tensors))

    def verify(self) -> None:
        """Compare every byte with the CRCs taken when it was copied.

        Raises:  CheckpointError naming the first tensor that changed
        """
        taken = self._crcs.result()
        for name, crc in _crcs_of(self.tensors).items():
            if crc != taken[name]:
                raise CheckpointError(
                    f"{name} changed in host memory since it was copied: CRC {crc:08x}, was "
                    f"{taken[name]:08x}; have this host's memory tested"
                )

    def give_up(self) -> dict[str, Tensor]:
        """The memory of a snapshot that nobody will use again."""
        self._crcs.result()
        return self.tensors


def copy_to_host(tensors: Iterable[tuple[str, Tensor]], reuse: Snapshot | None = None) -> dict[str, Tensor]:
    """Copies in host memory, pinned if the tensors lie on a GPU; complete on return.

    `reuse` is an older snapshot of the same tensors, whose memory is taken (allocating costs more time than
    copying) and which must not be used any more.
    """
    memory = reuse.give_up() if reuse is not None else {}
    copies = {}
    device = torch.device("cpu")
    for name, tensor in tensors:
        copy = memory.get(name)
        if copy is None or copy.shape != tensor.shape:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=True)
        device = tensor.device if tensor.is_cuda else device
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return copies


@dataclass(frozen=True)
class KeptSnapshot:
    """A snapshot with what the trainer needs to go on from it: as a `Checkpoint` has them."""

    step: int
    position: int
    meta: dict[str, Any]
    state: Snapshot


class Snapshots:
    """The last few snapshots of a run, oldest first; every rank takes them at the same steps."""

    def __init__(self, every_steps: int, kept: int, mesh: Mesh) -> None:
        """Take one every so many steps (0: never), and keep so many."""
        self._every, self._kept, self._mesh = every_steps, kept, mesh
        self._all: list[KeptSnapshot] = []

    @property
    def steps(self) -> list[int]:
        """The steps of which there is a snapshot, oldest first."""
        return [kept.step for kept in self._all]

    def is_due(self, step: int) -> bool:
        """Whether a snapshot is to be taken of this step."""
        return self._every > 0 and step > 0 and step % self._every == 0

    def take(
        self, step: int, position: int, meta: dict[str, Any], snapshot: Callable[[Snapshot | None], Snapshot]
    ) -> None:
        """Keep `snapshot(reuse)`, and drop the oldest where there are enough, to be its memory."""
        oldest = self._all.pop(0).state if len(self._all) == self._kept else None
        self._all.append(KeptSnapshot(step, position, meta, snapshot(oldest)))

    def newest_before(self, step: int) -> KeptSnapshot | None:
        """The newest snapshot at or before `step` that is unchanged on every rank, the same on all; or None.

        One that changed in any rank's memory is dropped by all, with a warning from that rank.

        Comm:  one gather of small JSON over the world for each snapshot tried
        """
        for kept in reversed(self._all[:]):
            if kept.step > step:
                continue
            failure = None
            try:
                kept.state.verify()
            except CheckpointError as error:
                failure = str(error)
                logger.warning("snapshot of step %d dropped: %s", kept.step, failure)
            if not any(gather_json(failure, self._mesh.world, self._mesh.device)):
                return kept
            self._all.remove(kept)
        return None

    def forget_after(self, step: int) -> None:
        """Drop the snapshots of later steps: a run that goes back to `step` leaves that future."""
        self._all = [kept for kept in self._all if kept.step <= step]


def _crcs_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: zlib.crc32(tensor.reshape(-1).numpy().view("u1").data) for name, tensor in tensors.items()}
