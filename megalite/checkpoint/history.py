"""What a run went back from, and so which of its checkpoints are of a future that it left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalite.checkpoint.agree import everywhere
from megalite.errors import CheckpointError
from megalite.log import LEDGER, read_json_lines
from megalite.parallel.mesh import Mesh


@dataclass(frozen=True)
class Rollback:
    """A spike and what was done about it, as the ledger and every later checkpoint keep it.

    Steps are counted from 1; `to_step` is the number of steps done in the weights gone back to.
    `skipped` are global sample indices, half-open.
    """

    onset: int
    detected: int
    reason: str
    to_step: int
    skipped: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self) | {"skipped": list(self.skipped)}

    @staticmethod
    def from_json(record: dict[str, Any]) -> Rollback:
        """The inverse of `to_json`; keys of a ledger line that do not belong to it are left out."""
        start, stop = record["skipped"]
        numbers = (int(record[key]) for key in ("onset", "detected", "to_step"))
        onset, detected, to_step = numbers
        return Rollback(onset, detected, str(record["reason"]), to_step, (int(start), int(stop)))


def read_ledger(run_dir: Path, mesh: Mesh) -> list[Rollback]:
    """The rollbacks of a run so far, as rank 0's ledger has them.

    Raises:  CheckpointError, on every rank, if it cannot be read or a line is not what a run writes
    """
    path = run_dir / LEDGER

    def read() -> list[dict[str, Any]]:
        lines = read_json_lines(path) if mesh.rank == 0 else []
        return [line for line in lines if line.get("event") == "rollback"]

    told = everywhere(mesh.world, mesh.device, read, run_dir)[0]
    try:
        return [Rollback.from_json(record) for record in told]
    except (KeyError, TypeError, ValueError) as error:
        found = CheckpointError(
            f"{path} has a rollback that is not one ({type(error).__name__}: {error}); which samples "
            "this run leaves out is not known: restore the file"
        )
        found.is_shared = True
        raise found from None


def known_rollbacks(meta: dict[str, Any], folder: Path) -> list[Rollback]:
    """The rollbacks that a checkpoint's meta tells of; an imported model's none.

    Raises:  CheckpointError if it holds what is none
    """
    try:
        known = meta["recovery"]["ladder"]["rollbacks"] if "recovery" in meta else []
        return [Rollback.from_json(record) for record in known]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has rollbacks that are none: {type(error).__name__}: {error}"
        ) from None


def abandoned_from(rollbacks: Sequence[Rollback], known: Sequence[Rollback]) -> int | None:
    """The step after which a checkpoint that knows only the `known` rollbacks is of a future that the run
    left, or None if it knows them all."""
    return min((r.to_step for r in rollbacks if r not in known), default=None)
