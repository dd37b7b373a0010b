"""A run's health: which steps are applied, and how it goes back when a spike is certain.

Every rank holds the same and decides the same, from what all agreed on. The ledger is the authority on
what was left out: its line is on disk before anything is changed, and a run that is killed in between,
or before its next checkpoint, reads it when it starts again. So the data a run sees is a function of
(seed, sample index, ledger), and the curve after a rollback is that of a run which never had the batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalite.checkpoint.history import Rollback
from megalite.checkpoint.snapshots import KeptSnapshot, Snapshots
from megalite.checkpoint.store import Checkpoint, newest
from megalite.config import Config
from megalite.engines.engine import StepSums
from megalite.errors import CheckpointError
from megalite.parallel.collectives import gather_json
from megalite.parallel.mesh import Mesh
from megalite.resilience.ladder import Ladder, Spike
from megalite.resilience.rerun import Shares
from megalite.resilience.spike import SpikeDetector


class Recovery:
    """Judges a run's steps, and finds what it may go back to."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        self._checkpoints = Path(config.run_dir) / "checkpoints"
        keys = config.checkpoint
        self.detector = SpikeDetector(config.resilience)
        self.ladder = Ladder(config)
        self.snapshots = Snapshots(keys.snapshot_every_steps, keys.snapshots_kept, mesh)
        self._regime: tuple[int, ...] | None = None

    # --- state ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON."""
        regime = None if self._regime is None else list(self._regime)
        return {"detector": self.detector.state(), "ladder": self.ladder.state(), "regime": regime}

    def load(self, meta: dict[str, Any] | None, ledger: list[Rollback]) -> None:
        """Go on from a checkpoint's or snapshot's meta, from the seed or an imported model, which have none;
        `ledger` knows every rollback."""
        if meta is None or "recovery" not in meta:
            self.detector.forget()
            self.ladder.load({"rollbacks": [], "refused": [], "refused_in_a_row": 0}, ledger)
            self._regime = None
            return
        state = meta["recovery"]
        self.detector.load(state["detector"])
        self.ladder.load(state["ladder"], ledger)
        self._regime = None if state["regime"] is None else tuple(map(int, state["regime"]))

    # --- at every step --------------------------------------------------------------------------

    def enter(self, regime: tuple[int, ...]) -> None:
        """The next step's kind of data, `DataLoader.regime`: when it changes, so may the loss."""
        if self._regime is not None and regime != self._regime:
            self.detector.forget()
        self._regime = regime

    def applied(self, step: int, loss: float, grad_norm: float) -> Spike | None:
        """Take note of a step that was applied; a slow divergence, if it shows one."""
        self.ladder.applied()
        self.detector.accept(step, loss, grad_norm)
        onset = self.detector.slow_onset
        if onset is None:
            return None
        return Spike(onset + 1, step, "the loss has been climbing since")

    def shares(self, sums: StepSums) -> Shares:
        """Every rank's part of a step's loss and squared gradient norm."""
        mine = [sums.loss, sums.grad_norm_squared]
        return [(a, b) for a, b in gather_json(mine, self._mesh.world, self._mesh.device)]

    def target(self, spike: Spike) -> KeptSnapshot | Checkpoint | None:
        """What to go back to: the newest snapshot or checkpoint that is old enough.

        Where none is, what lies before the onset at all, the oldest snapshot first, or else the newest there
        is of either; None, the seed, only where there is nothing else.

        Raises:  CheckpointError if there are checkpoints, and neither a snapshot nor one that verifies
        """
        onset = spike.onset - 1
        found = self._newest(self.ladder.latest_target(spike))
        early = [step for step in self.snapshots.steps if step <= onset]
        if found is None and early:
            found = self.snapshots.newest_before(min(early))
        found = found or self._newest(onset) or self._newest(spike.detected)
        return found or newest(self._checkpoints, self._mesh, ledger=self.ladder.rollbacks)

    def _newest(self, before: int) -> KeptSnapshot | Checkpoint | None:
        """The newest snapshot or checkpoint at or before a step that verifies; of one step the snapshot."""
        kept = self.snapshots.newest_before(before)
        after = -1 if kept is None else kept.step
        try:
            return newest(self._checkpoints, self._mesh, before, after, self.ladder.rollbacks) or kept
        except CheckpointError:  # none verifies, of which a warning has told
            return kept
